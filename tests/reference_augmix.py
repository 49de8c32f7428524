"""AugMix like its authors' code, on PIL images and one sample at a time, with given random choices."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


def to_pil(image):
    """Converts uint8 [C, H, W] with C = 1 or 3."""
    array = image.numpy().transpose(1, 2, 0)
    return Image.fromarray(array[:, :, 0] if len(image) == 1 else array)


def from_pil(image):
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def int_parameter(level, most):
    return int(level * most / 10)


def float_parameter(level, most):
    return float(level) * most / 10.0


def affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


def operation(image, name, level, negative):
    """Applies one of the nine operations; the authors' `sample_level` draws `level`, and a coin draws `negative`."""
    sign = -1 if negative else 1
    match name:
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "posterize":
            return ImageOps.posterize(image, 4 - int_parameter(level, 4))
        case "rotate":
            return image.rotate(sign * int_parameter(level, 30), resample=Image.Resampling.BILINEAR)
        case "solarize":
            return ImageOps.solarize(image, 256 - int_parameter(level, 256))
        case "shear_x":
            return affine(image, (1, sign * float_parameter(level, 0.3), 0, 0, 1, 0))
        case "shear_y":
            return affine(image, (1, 0, 0, sign * float_parameter(level, 0.3), 1, 0))
        case "translate_x":
            return affine(image, (1, 0, sign * int_parameter(level, image.width / 3), 0, 1, 0))
        case "translate_y":
            return affine(image, (1, 0, 0, 0, 1, sign * int_parameter(level, image.height / 3)))
    raise ValueError(name)


def to_tensor(image):
    return from_pil(image).float().div(255)


def augment_and_mix(image, chains, weights, mixing):
    """Augments an image; `chains` holds for each chain a list of (name, level, negative)."""
    ws, m = np.float32(weights), np.float32(mixing)
    mix = torch.zeros_like(to_tensor(image))
    for weight, chain in zip(ws, chains, strict=True):
        augmented = image.copy()
        for name, level, negative in chain:
            augmented = operation(augmented, name, level, negative)
        mix += float(weight) * to_tensor(augmented)
    return float(1 - m) * to_tensor(image) + float(m) * mix


def loss(model, x, first, second, y):
    """Returns the loss of their training loop, on three views of a minibatch in one forward."""
    clean, aug1, aug2 = torch.split(model(torch.cat([x, first, second])), len(x))
    p_clean, p_aug1, p_aug2 = (F.softmax(z, dim=1) for z in (clean, aug1, aug2))
    mixture = torch.clamp((p_clean + p_aug1 + p_aug2) / 3.0, 1e-7, 1).log()
    divergence = sum(F.kl_div(mixture, p, reduction="batchmean") for p in (p_clean, p_aug1, p_aug2)) / 3.0
    return F.cross_entropy(clean, y) + 12 * divergence
