"""The embedded data set: images in CIFAR's shape, drawn from a fixed seed, no download.

Each image shows one of ten shapes filled with one of ten textures, at a random place, size, phase
and in random colours, with noise. In synthetic10 the texture is the class and the shape is chance;
in synthetic100 both together are the class. Nothing fixed stands at a fixed pixel, so a linear
classifier learns little, and a small convolutional network nearly everything. All shapes and
textures are their own mirror images, because training flips images.
"""

import numpy as np

TEXTURES = (
    "plain", "lines", "wide-lines", "columns", "wide-columns", "checks", "wide-checks", "lattice",
    "ripples", "speckle",
)  # fmt: skip
SHAPES = (
    "disc", "square", "diamond", "tent", "funnel", "plus", "saltire", "hourglass", "bow", "pill",
)  # fmt: skip

SIZE = 32
# So many images are drawn at a time, which bounds the memory; the number is part of the seed.
_CHUNK = 500
_TRAIN, _TEST = 0, 1
# Each texture repeats after this many pixels.
_PERIODS = {
    "lines": 4, "wide-lines": 9, "columns": 4, "wide-columns": 9, "checks": 6, "wide-checks": 13,
    "lattice": 8, "ripples": 6,
}  # fmt: skip

# Mean and standard deviation per channel of all 50,000 training images, with pixels scaled to
# 0..1. Both data sets have the same images.
STATISTICS = ((0.4989, 0.4991, 0.4979), (0.2049, 0.2043, 0.2045))


def class_names(classes: int) -> tuple[str, ...]:
    """Return the names of the 10 or 100 classes in the order of their labels."""
    if classes == 10:
        return TEXTURES
    return tuple(f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES)


def generate(classes: int, train: bool, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the first ``count`` images of a set, the same ones whatever ``count`` is.

    Returns:
        (count, 32, 32, 3) uint8 images and (count,) int64 labels.
    """
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(count, np.int64)
    for chunk, start in enumerate(range(0, count, _CHUNK)):
        stream = np.random.RandomState([_TRAIN if train else _TEST, chunk])
        shapes = stream.randint(0, len(SHAPES), _CHUNK)
        textures = stream.randint(0, len(TEXTURES), _CHUNK)
        part = slice(start, min(start + _CHUNK, count))
        size = part.stop - part.start
        images[part] = _draw(stream, shapes, textures)[:size]
        labels[part] = (textures if classes == 10 else len(TEXTURES) * shapes + textures)[:size]
    return images, labels


def _draw(stream: np.random.RandomState, shapes: np.ndarray, textures: np.ndarray) -> np.ndarray:
    """Return (B, 32, 32, 3) uint8 images with the given shapes and textures, each (B,)."""
    count = len(shapes)

    def column(low: float, high: float) -> np.ndarray:
        return stream.uniform(low, high, (count, 1, 1)).astype(np.float32)

    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)[:, None]
    center_x, center_y, radius = column(12, 20), column(12, 20), column(10, 14)
    right, down = x - center_x, y - center_y  # pixels from the center, (B, 32, 32)
    inside = np.empty((count, SIZE, SIZE), bool)
    for number, name in enumerate(SHAPES):
        chosen = shapes == number
        u, v = right[chosen] / radius[chosen], down[chosen] / radius[chosen]
        inside[chosen] = _shape(name, u, v)
    phase_x, phase_y, stretch = column(0, 2 * np.pi), column(0, 2 * np.pi), column(0.9, 1.1)
    pattern = np.empty((count, SIZE, SIZE), np.float32)
    for number, name in enumerate(TEXTURES):
        chosen = textures == number
        waves = (right[chosen] * stretch[chosen], down[chosen] * stretch[chosen])
        pattern[chosen] = _texture(name, *waves, phase_x[chosen], phase_y[chosen], stream)
    # The planes come channel by channel because whole rows at a time are fast.
    ground, paint, contrast = (
        stream.uniform(low, high, (count, 3, 1, 1)).astype(np.float32)
        for low, high in ((30, 225), (80, 175), (15, 40))
    )
    filled = paint + contrast * pattern[:, None]
    planes = np.where(inside[:, None], filled, ground).astype(np.uint8)  # (B, 3, 32, 32)
    picture = np.moveaxis(planes, 1, 3).astype(np.int16, order="C")
    # The noise, over -20 .. 20, is made from bytes because whole numbers take long to draw.
    noise = np.frombuffer(stream.bytes(picture.size), np.uint8).reshape(picture.shape)
    picture += (noise.astype(np.uint16) * 41 >> 8).astype(np.int16) - 20
    return np.clip(picture, 0, 255, out=picture).astype(np.uint8)


def _shape(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return which points lie inside; (u, v) point right and down, a shape reaches to about 1."""
    across, along = np.abs(u), np.abs(v)
    far, near = np.maximum(across, along), np.minimum(across, along)
    if name == "disc":
        return u * u + v * v < 1
    if name == "square":
        return far < 0.85
    if name == "diamond":
        return across + along < 1.2
    if name == "tent":
        return (along < 0.9) & (across < 0.55 * (v + 0.9))
    if name == "funnel":
        return (along < 0.9) & (across < 0.55 * (0.9 - v))
    if name == "plus":
        return (near < 0.4) & (far < 1)
    if name == "saltire":
        return (np.abs(across - along) < 0.45) & (far < 0.95)
    if name == "hourglass":
        return (along < 0.95) & (across < 0.25 + 0.75 * along)
    if name == "bow":
        return (across < 0.95) & (along < 0.25 + 0.75 * across)
    return (along < 0.5) & (across < 1.1)  # pill


def _texture(
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    phase_x: np.ndarray,
    phase_y: np.ndarray,
    stream: np.random.RandomState,
) -> np.ndarray:
    """Return -1 or 1 (0 without a pattern) at points x right and y down, in pixels."""
    if name == "plain":
        return np.zeros_like(x + y)
    if name == "speckle":
        return np.sign(stream.uniform(-1, 1, (x + y).shape)).astype(np.float32)

    def wave(position: np.ndarray, phase: np.ndarray) -> np.ndarray:
        return np.sign(np.sin(position * (2 * np.pi / _PERIODS[name]) + phase))

    if name.endswith("lines"):
        return wave(y, phase_y) + 0 * x
    if name.endswith("columns"):
        return wave(x, phase_x) + 0 * y
    if name.endswith("checks"):
        return wave(x, phase_x) * wave(y, phase_y)
    if name == "lattice":
        return wave(x + y, phase_x) * wave(x - y, phase_y)
    return wave(np.sqrt(x * x + y * y), phase_x)  # ripples
