"""Resampling of images, segmentations and logits: one small matrix per axis.

An axis-aligned resize with splines is linear and separable. The matrix of one axis is what the
reference (`scipy.ndimage.zoom` on half-pixel centres, edges repeated) makes of the identity.
"""

from __future__ import annotations

from medseg.resample.axis import axis_matrix, is_anisotropic, new_shape, separate_axis
from medseg.resample.image import resize
from medseg.resample.labels import resize_labels
from medseg.resample.literal import resize_labels_literal, resize_literal
from medseg.resample.logits import Slab, resize_slab, rows_needed

__all__ = [
    "Slab",
    "axis_matrix",
    "is_anisotropic",
    "new_shape",
    "resize",
    "resize_labels",
    "resize_labels_literal",
    "resize_literal",
    "resize_slab",
    "rows_needed",
    "separate_axis",
]
