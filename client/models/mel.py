"""A log-mel front end in plain PyTorch: from sound to a spectrogram."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

__all__ = ["LogMel", "mel_matrix"]

_WINDOW = 0.032
"""Seconds of a frame: long enough for a low voice, short enough for a consonant."""
_RATE = 16_000.0
"""Samples a second, where a data set does not say."""
_FLOOR = 1e-6
"""Power below which there is silence; sound is within -1..1."""


class LogMel(nn.Module):
    """Logarithm of the power in bands of the mel scale, frame by frame.

    Frames are half a frame apart and weighted by Hann's window. Each sample has mean 0 and
    standard deviation 1 afterwards, so that loudness does not matter. It has no parameters.

    Parameters
    ----------
    length : int
        Samples of a waveform.
    rate : float
        Samples a second; 0: 16,000.
    mels : int
        Bands.

    Attributes
    ----------
    frames : int
        Frames of a waveform.

    Raises
    ------
    ConfigError
        If a waveform is shorter than a frame.
    """

    window: Tensor
    matrix: Tensor

    def __init__(self, length: int, rate: float, mels: int) -> None:
        super().__init__()
        rate = rate or _RATE
        # A power of two, which the Fourier transform is fastest with.
        self.size = 2 ** round(math.log2(_WINDOW * rate))
        self.hop = self.size // 2
        if length < self.size:
            raise ConfigError(
                f"samples of {counted(length, 'step')} at {rate:g} a second are shorter "
                f"than a frame of {self.size}; give longer ones, or the right rate"
            )
        self.frames = 1 + (length - self.size) // self.hop
        # Not persistent: constants neither travel nor are kept.
        window = torch.hann_window(self.size)
        self.register_buffer("window", window, persistent=False)
        matrix = mel_matrix(self.size, rate, mels)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform waveforms.

        Parameters
        ----------
        x : Tensor, float [n, T]
            Sound from -1 to 1.

        Returns
        -------
        Tensor, float [n, frames, mels]
        """
        # Sliced and not torch.stft, which cannot be stacked over clients.
        frames = x.unfold(1, self.size, self.hop) * self.window
        power = torch.fft.rfft(frames).abs().square()
        logs = (power @ self.matrix + _FLOOR).log()
        centred = logs - logs.mean((1, 2), keepdim=True)
        spread = centred.square().mean((1, 2), keepdim=True).sqrt()
        normalised: Tensor = centred / (spread + 1e-5)
        return normalised


def mel_matrix(size: int, rate: float, mels: int) -> Tensor:
    """Make the triangles that sum frequencies up to bands of the mel scale.

    The scale is ``2595 log10(1 + f / 700)`` (O'Shaughnessy 1987). Triangles overlap by half,
    from 0 to half the rate.

    Parameters
    ----------
    size : int
        Samples of a frame.
    rate : float
        Samples a second.
    mels : int
        Bands.

    Returns
    -------
    Tensor, float32 [size // 2 + 1, mels]
        Weight of each frequency in each band. Bands narrower than a frequency take the
        nearest one.
    """
    double = torch.float64
    frequencies = torch.linspace(0, rate / 2, size // 2 + 1, dtype=double)
    top = 2595 * math.log10(1 + rate / 2 / 700)
    points = torch.linspace(0, top, mels + 2, dtype=double)
    edges = 700 * (10 ** (points / 2595) - 1)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies[:, None] - low) / (middle - low)
    falling = (high - frequencies[:, None]) / (high - middle)
    weights = torch.minimum(rising, falling).clamp(min=0)
    nearest = (frequencies[:, None] - middle).abs().argmin(0)
    is_nearest = torch.arange(len(frequencies))[:, None] == nearest
    # Not by an index, which PyTorch's meta device cannot take.
    weights = torch.where(weights.sum(0) == 0, is_nearest.double(), weights)
    return weights.float()
