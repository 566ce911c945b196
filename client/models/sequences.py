"""Small networks for sensors, sound and text.

Each takes several kinds of samples. A stem turns them into steps ``[n, T, features]``: series
as they are, sound by a log-mel front end, tokens by an embedding. All is written in plain
operations, so that it can be differentiated twice and trained for many clients at once.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.samples import PADDING, SampleSpec
from fedknow.client.models.layers import Chance, Dropout
from fedknow.client.models.mel import LogMel
from fedknow.client.models.split import Body
from fedknow.protocols.config import ConfigError

__all__ = ["cnn1d", "gru", "transformer"]

Size = Annotated[int, Field(ge=1, le=65_536)]
Depth = Annotated[int, Field(ge=1, le=64)]
Mels = Annotated[int, Field(ge=4, le=512)]


def cnn1d(  # noqa: PLR0913  # the network's settings
    sample: SampleSpec,
    channels: Size = 32,
    layers: Depth = 3,
    kernel: Annotated[int, Field(ge=1, le=255)] = 5,
    hidden: Size = 64,
    mels: Mels = 40,
) -> Body:
    """1-D CNN over time, for windows of sensors and for sound.

    Each convolution is followed by ReLU and pooling by 2, as long as there are steps to pool,
    and has twice the filters of the one before it, up to four times the first one's. Mean and
    maximum over time go through a hidden layer.

    Parameters
    ----------
    sample : SampleSpec
        A series ``[T, C]`` or a waveform ``[T]``.
    channels : int
        Filters of the first convolution.
    layers : int
        Convolutions.
    kernel : int
        Time steps that a filter sees; odd.
    hidden : int
        Features.
    mels : int
        Waveforms: bands of the log-mel front end.

    Raises
    ------
    ConfigError
        If ``kernel`` is even, or a waveform is shorter than a frame.
    """
    if kernel % 2 == 0:
        raise ConfigError(
            f"model.kernel = {kernel}: cnn1d's filters have a middle; make it odd"
        )
    stem, steps, inputs = _stem(sample, mels)
    body: list[nn.Module] = [*stem, _TimeLast()]
    for layer in range(layers):
        # Twice the channels where the steps are halved, up to four times.
        outputs = channels * min(2**layer, 4)
        body.append(nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2))
        body.append(nn.ReLU())
        # A single step cannot be halved.
        if steps >= 2:
            body.append(nn.MaxPool1d(2))
            steps //= 2
        inputs = outputs
    body += [
        _MeanAndMaximum(),
        nn.Linear(2 * inputs, hidden),
        nn.ReLU(),
    ]
    return nn.Sequential(*body), hidden


def gru(
    sample: SampleSpec,
    hidden: Size = 64,
    embedding: Size = 64,
    mels: Mels = 40,
) -> Body:
    """Gated recurrent network (Cho et al. 2014), for series, sound and text.

    Its features are the state after the last step; steps without a token are passed over.

    Parameters
    ----------
    sample : SampleSpec
        A series ``[T, C]``, a waveform ``[T]`` or tokens ``[T]``.
    hidden : int
        Size of the state, and number of features.
    embedding : int
        Tokens: size of their vectors.
    mels : int
        Waveforms: bands of the log-mel front end.

    Raises
    ------
    ConfigError
        If a waveform is shorter than a frame.
    """
    if sample.kind == "tokens":
        return _TokenGru(sample.vocabulary, embedding, hidden), hidden
    stem, _, inputs = _stem(sample, mels)
    return nn.Sequential(*stem, Gru(inputs, hidden)), hidden


def transformer(  # noqa: PLR0913  # the network's settings
    sample: SampleSpec,
    dim: Size = 64,
    heads: Depth = 4,
    layers: Annotated[int, Field(ge=0, le=64)] = 2,
    dropout: Chance = 0.0,
    mels: Mels = 40,
) -> Body:
    """Attention layers (Vaswani et al. 2017), for text, series and sound.

    Layers normalise before attention and before their two fully connected layers, which are
    four times as wide. Positions are learned. Features are the mean over steps; steps without
    a token have no part in it, and nothing attends to them. With ``layers = 0`` it is the mean
    of embedded tokens, a strong and cheap network for short texts.

    Parameters
    ----------
    sample : SampleSpec
        Tokens ``[T]``, a series ``[T, C]`` or a waveform ``[T]``.
    dim : int
        Size of the vectors, and number of features.
    heads : int
        Attention heads; a divisor of ``dim``.
    layers : int
        Attention layers.
    dropout : float
        Chance that a value is dropped after attention and after the connected layers.
    mels : int
        Waveforms: bands of the log-mel front end.

    Raises
    ------
    ConfigError
        If ``heads`` does not divide ``dim``, or a waveform is shorter than a frame.
    """
    if dim % heads:
        raise ConfigError(f"model.heads = {heads}: must divide model.dim = {dim}")
    blocks = [Block(dim, heads, dropout) for _ in range(layers)]
    if sample.kind == "tokens":
        words = nn.Embedding(sample.vocabulary, dim)
        # So that a token weighs as much as its position, and a sum of products is about 1.
        nn.init.normal_(words.weight, std=dim**-0.5)
        return _Encoder([], words, sample.shape[0], blocks, dim), dim
    stem, steps, inputs = _stem(sample, mels)
    return _Encoder(stem, nn.Linear(inputs, dim), steps, blocks, dim), dim


def _stem(sample: SampleSpec, mels: int) -> tuple[list[nn.Module], int, int]:
    """Make what turns samples into steps.

    Returns
    -------
    (list of Module, int, int)
        Modules, how many steps they give, and features of a step.
    """
    if sample.kind == "series":
        steps, inputs = sample.shape
        return [], steps, inputs
    front = LogMel(sample.shape[0], sample.rate, mels)
    return [front], front.frames, mels


class _TimeLast(nn.Module):
    """Lay steps out as convolutions take them."""

    def forward(self, x: Tensor) -> Tensor:
        """Transpose ``[n, T, C]`` to ``[n, C, T]``."""
        return x.transpose(1, 2)


class _MeanAndMaximum(nn.Module):
    """Sum up all steps of each channel by two numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool ``[n, C, T]`` to ``[n, 2 C]``."""
        # How much of a pattern there is, and whether there is any.
        return torch.cat([x.mean(2), x.amax(2)], 1)


class Gru(nn.Module):
    """A gated recurrent layer in plain operations.

    Its equations are those of :class:`torch.nn.GRU`, whose kernels can neither be stacked over
    clients nor, on a GPU, be differentiated twice.

    Parameters
    ----------
    inputs, hidden : int
        Features of a step, and size of the state.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        # Not asked of a layer, in whose place an adapter may stand.
        self.hidden = hidden
        self.inputs = nn.Linear(inputs, 3 * hidden)
        self.recurrent = nn.Linear(hidden, 3 * hidden)
        # As PyTorch's own recurrent layers begin.
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor, is_step: Tensor | None = None) -> Tensor:
        """Compute the state after the last step.

        Parameters
        ----------
        x : Tensor, float [n, T, C]
            Steps.
        is_step : Tensor, bool [n, T], optional
            Steps that count; others leave the state as it is.

        Returns
        -------
        Tensor, float [n, hidden]
        """
        # All steps at once: only the recurrent half must wait for the step before.
        steps = self.inputs(x).unbind(1)
        state = torch.zeros_like(steps[0][:, : self.hidden])
        for place, step in enumerate(steps):
            new = self._next(step, state)
            if is_step is not None:
                # Padding leaves the state alone, so the last one is that of the last token.
                new = torch.where(is_step[:, place, None], new, state)
            state = new
        return state

    def _next(self, step: Tensor, state: Tensor) -> Tensor:
        reset, update, candidate = step.chunk(3, 1)
        own_reset, own_update, own_candidate = self.recurrent(state).chunk(3, 1)
        gate = torch.sigmoid(reset + own_reset)
        gate_update = torch.sigmoid(update + own_update)
        new = torch.tanh(candidate + gate * own_candidate)
        # (1 - z) n + z h with one product less.
        return new + gate_update * (state - new)


class _TokenGru(nn.Module):
    """Embedded tokens, read one after the other."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, embedding)
        self.cell = Gru(embedding, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Compute features ``[n, hidden]`` of token ids, int64 ``[n, T]``."""
        state: Tensor = self.cell(self.words(x), x != PADDING)
        return state


class Block(nn.Module):
    """Attention, then two fully connected layers, each added to what came in.

    Parameters
    ----------
    dim, heads : int
        Size of the vectors, and number of heads.
    dropout : float
        Chance that a value is dropped.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.projections = nn.Linear(dim, 3 * dim)
        self.joined = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.wide = nn.Linear(dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)
        self.dropout = Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor, is_step: Tensor | None) -> Tensor:
        """Transform steps.

        Parameters
        ----------
        x : Tensor, float [n, T, dim]
            Steps.
        is_step : Tensor, bool [n, T], or None
            Steps that others may attend to; None: all.

        Returns
        -------
        Tensor, float [n, T, dim]
        """
        x = x + self.dropout(self._attend(self.attention_norm(x), is_step))
        wide = F.gelu(self.wide(self.norm(x)))
        answer: Tensor = x + self.dropout(self.narrow(wide))
        return answer

    def _attend(self, x: Tensor, is_step: Tensor | None) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.projections(x).chunk(3, 2)
        )
        # Unscaled products grow with the width, and would saturate the softmax.
        scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        if is_step is not None:
            # The lowest number and not minus infinity: a sample without tokens stays finite.
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~is_step[:, None, None], lowest)
        mixed = scores.softmax(3) @ value
        joined: Tensor = self.joined(mixed.transpose(1, 2).flatten(2))
        return joined


class _Encoder(nn.Module):
    """Steps, positions, attention layers, and the mean over steps."""

    def __init__(
        self,
        stem: list[nn.Module],
        embedding: nn.Embedding | nn.Linear,
        steps: int,
        blocks: list[Block],
        dim: int,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*stem)
        self.embedding = embedding
        self.positions = nn.Parameter(torch.empty(steps, dim))
        nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Compute features ``[n, dim]`` of tokens or of steps."""
        is_step = (
            x != PADDING if isinstance(self.embedding, nn.Embedding) else None
        )
        steps: Tensor = self.embedding(self.stem(x)) + self.positions
        for block in self.blocks:
            steps = block(steps, is_step)
        steps = self.norm(steps)
        if is_step is None:
            return steps.mean(1)
        weights = is_step.to(steps.dtype)[:, :, None]
        # A text without words has no step to divide by.
        count = weights.sum(1).clamp(min=1)
        return (steps * weights).sum(1) / count
