"""Random augmentation of whole minibatches on their own device: crops and flips; AugMix and its nine operations."""

from bt_fast.augment.crops import CropAndFlip, crop

__all__ = ["CropAndFlip", "crop"]
