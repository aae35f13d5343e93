"""What is deployed: the embedded services of one machine, and what replaces them on a cluster.

Knows nothing of flows; `infra.local` is the door to the embedded services.
"""
