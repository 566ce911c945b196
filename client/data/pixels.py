"""One picture of any kind as 8-bit grey or colour: right, or refused.

The rules:

* 16-bit grey is scaled by 1/257, so that 65,535 becomes 255. Pillow itself cuts it off at 255. Of
  16-bit colour Pillow keeps the upper byte, which is at most one level away.
* Transparency is laid on white. Where that leaves one colour of a picture that has more, the
  picture is refused.
* A photograph is turned as its EXIF orientation says. Colour profiles are not applied.
* Palettes, 1-bit, CMYK and YCbCr become RGB by Pillow's plain formulas.
* Pictures of 32 bits a pixel, of several frames, or of other colour spaces are refused, as no rule
  says which 8-bit pixels are meant.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedknow.client.data.arrays import require
from fedknow.protocols.errors import FedknowError

__all__ = ["UnusablePictureError", "to_eight_bit"]

_GREY = frozenset(("1", "L", "LA", "La"))
_COLOUR = frozenset(("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"))
_SIXTEEN_BIT = frozenset(("I;16", "I;16L", "I;16B", "I;16N"))

# Tags of a TIFF file.
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_SAMPLE_FORMAT = 339
_WHITE_IS_ZERO = 0
_UNSIGNED = 1

_ORIENTATION = 0x0112
"""EXIF's tag of how the camera was held."""


class UnusablePictureError(FedknowError, ValueError):
    """A picture that can be decoded and has no certain 8-bit pixels.

    The message says why, and what to do.
    """


def to_eight_bit(image: Any, mode: str) -> Any:
    """Convert an opened picture to 8-bit grey or colour.

    Parameters
    ----------
    image : PIL.Image.Image
        As ``PIL.Image.open`` gives it; not loaded yet, as the depth of a file's samples is known
        only until then.
    mode : {"L", "RGB"}
        Grey or colour.

    Returns
    -------
    PIL.Image.Image
        Of that mode.

    Raises
    ------
    UnusablePictureError
        If no rule says which pixels are meant.
    """
    # The frames after a camera's first one (MPO) are previews, or what the other lens saw.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise UnusablePictureError(
            "has several frames, and a sample is one; save each frame as a file of its own"
        )
    # Read before the picture is loaded, as Pillow forgets it then.
    layout = _sample_layout(image)
    # Pillow opens lazily: only now does a truncated file show.
    image.load()
    _check_tiff(image)
    turn = _turn(image)
    opaque = _opaque(_eight_bit_samples(image), layout)
    upright = opaque if turn is None else opaque.transpose(turn)
    # Last, as transparency and depth are lost in it.
    return upright.convert(mode)


# --- depth of the samples -------------------------------------------------------------------------


def _sample_layout(image: Any) -> str:
    """Name the samples' layout as Pillow does (``L;2``, ``RGB;16B``)."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0][3]
    layout = (
        arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    )
    return layout if isinstance(layout, str) else ""


def _check_tiff(image: Any) -> None:
    """Refuse TIFF files whose samples Pillow hands on as if they were others."""
    if image.format != "TIFF":
        return
    tags = image.tag_v2
    if {_UNSIGNED} != set(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))):
        raise UnusablePictureError(
            f"has signed or fractional samples; {_SAVE_AS_EIGHT_BIT}"
        )
    if image.mode not in _SIXTEEN_BIT:
        return
    if set(tags.get(_BITS_PER_SAMPLE, (1,))) != {16}:
        raise UnusablePictureError(
            f"has samples of 9 to 15 bits; {_SAVE_AS_EIGHT_BIT}"
        )
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise UnusablePictureError(
            f"has 16-bit samples whose 0 is white; {_SAVE_AS_EIGHT_BIT}"
        )


_SAVE_AS_EIGHT_BIT = "save it with 8 bits a channel (0 to 255)"


def _eight_bit_samples(image: Any) -> Any:
    """Scale 16-bit grey to 8-bit; refuse modes without a known scale."""
    if image.mode in _GREY or image.mode in _COLOUR:
        return image
    # Pillow has scaled a portable grey map to 16 bits; before 11 it opened 16-bit PNG as I, too.
    if image.mode in _SIXTEEN_BIT and image.format in ("PNG", "TIFF", "PPM"):
        return _scaled(image)
    # In other formats this mode holds 32 bits, whose scale nobody knows.
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return _scaled(image)
    raise UnusablePictureError(
        f"has pixels of Pillow's mode {image.mode!r}, for which no scale to 0..255 is "
        f"known; {_SAVE_AS_EIGHT_BIT}"
    )


def _scaled(image: Any) -> Any:
    pillow = require("PIL.Image")
    levels = np.asarray(image).astype(np.int64)
    # Rounded to the nearest. There are no ties, as 257 is odd.
    grey = pillow.fromarray(((levels + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return grey
    alpha = pillow.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))
    return pillow.merge("LA", (grey, alpha))


# --- transparency ---------------------------------------------------------------------------------


def _opaque(image: Any, layout: str) -> Any:
    """Lay a picture on white; one without transparency stays as it is."""
    is_grey = image.mode in _GREY
    opaque_mode = "L" if is_grey else "RGB"
    if not image.has_transparency_data:
        return image.convert(opaque_mode)
    if image.mode in ("L", "RGB") and ";" in layout:
        # The transparent colour is given in the file's own depth, which Pillow does not scale.
        raise UnusablePictureError(
            f"has a transparent colour and samples of another depth than 8 bits "
            f"({layout}); {_SAVE_AS_EIGHT_BIT}"
        )
    layered = image.convert("LA" if is_grey else "RGBA")
    alpha = layered.getchannel("A")
    colours = layered.convert(opaque_mode)
    if alpha.getextrema() == (255, 255):
        return colours
    page = require("PIL.Image").new(opaque_mode, image.size, "white")
    page.paste(colours, mask=alpha)
    if _is_one_colour(page) and not _is_one_colour(layered):
        raise UnusablePictureError(
            "is one colour when its transparency is laid on white, though it holds more; save it "
            "without transparency, on the background that is meant"
        )
    return page


def _is_one_colour(image: Any) -> bool:
    for band in image.getbands():
        low, high = image.getchannel(band).getextrema()
        if low != high:
            return False
    return True


# --- orientation ----------------------------------------------------------------------------------


def _turn(image: Any) -> Any:
    """Find the transposition that turns a photograph upright, or None."""
    transpose = require("PIL.Image").Transpose
    turns = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }
    return turns.get(image.getexif().get(_ORIENTATION))
