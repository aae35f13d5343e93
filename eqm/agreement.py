"""Do samples look like their class, to somebody who had no part in making them?

A scikit-learn classifier is fitted on training images alone (no held-out image, no feature of ours)
and reads samples and held-out images. Called by
evaluate, measures and reference.
"""

import numpy as np
from numpy.typing import NDArray

LARGEST_SIDE_PX = 16
"""Larger images are averaged down to this before they are read."""
MOST_IMAGES = 10_000

Images = NDArray[np.uint8]


class Reader:
    """A support vector classifier on pixels, fitted on training images (N, C, H, W) uint8."""

    def __init__(self, images: Images, labels: NDArray[np.int64]) -> None:
        from sklearn.dummy import DummyClassifier
        from sklearn.svm import SVC

        images, labels = images[:MOST_IMAGES], labels[:MOST_IMAGES]
        # There is no boundary to fit where there is one class.
        one = len(np.unique(labels)) == 1
        self._classifier = DummyClassifier() if one else SVC(C=10.0, gamma="scale")
        self._classifier.fit(_flat(images), labels)

    def agreement(self, images: Images, labels: NDArray[np.int64]) -> float:
        """Share of images that are read as their label."""
        return float(np.mean(self._classifier.predict(_flat(images)) == labels))


def thumbnails(images: Images) -> Images:
    """Images (N, C, H, W) with sides brought to LARGEST_SIDE_PX or less by averaging blocks.

    What is left over beyond whole blocks is cut off. Smaller images stay as they are.
    """
    step = -(-images.shape[-1] // LARGEST_SIDE_PX)
    side = images.shape[-1] // step * step
    n, c = images.shape[:2]
    blocks = images[..., :side, :side].reshape(n, c, side // step, step, side // step, step)
    return np.rint(blocks.mean(axis=(3, 5))).astype(np.uint8)


def _flat(images: Images) -> NDArray[np.float64]:
    """Pixels of thumbnails as rows in [0, 1]."""
    return thumbnails(images).reshape(len(images), -1).astype(np.float64) / 255
