def decay(c):
    return lambda g: c.multiplier * ((1 - g) / (1 - c.a)).clamp(max=1)


def eqm_loss(field, x, eps, gamma, labels, *, c, create_graph):
    g = gamma.view(-1, 1, 1, 1)
    xg = g * x + (1 - g) * eps
    return (
        (field.gradient(xg, labels, create_graph=create_graph) - (eps - x) * c(g))
        .pow(2)
        .flatten(1)
        .mean(1)
    )
