"""mini: CLAPSep's ideas at a fiftieth of its size, for the bundled model.

A positive and a negative embedding in one shared text-audio space drive FiLM layers of a convolutional U-Net with a
recurrent bottleneck; its output masks the magnitude STFT of the mixture. The shared space is a frozen table of word
vectors (`weights/make_text.py`); the audio encoder is trained into it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli import dsp
from clapsep_cli.errors import QueryError
from clapsep_cli.models import base

NEAR, NEAR_WORDS = 0.66, 200  # how alike a word is spelt that may have been meant, 0 to 1; how many are compared
STRETCH_SECONDS = 5  # that the audio encoder hears at once, with silence behind what is shorter: so it was trained
SILENCE_RMS = 1e-5  # quieter windows are not brought to level: there is nothing in them (−100 dBFS)


@dataclass(frozen=True)
class MiniConfig:
    """Sizes of a mini model. `dim`: of the shared space; `words`: rows of the word table."""

    dim: int = 160
    words: int = 85_000
    seconds: int = 10
    bands: int = 128
    linear_bands: int = 48  # the lowest bands are single bins, to tell close partials apart
    channels: tuple[int, ...] = (32, 64, 128, 192)
    query: int = 256
    hidden: int = 192  # of the GRU, each way
    fine: int = 4  # channels of the refinement at full resolution
    audio_channels: tuple[int, ...] = (32, 64, 128, 256)


@lru_cache
def band_matrix(bands: int, linear: int) -> Tensor:
    """Return the share of each bin in each band, float32 `[bands, 513]`, columns of sum 1.

    The first `linear` bands are bins 0 … linear − 1; the others are triangles that widen evenly on a log scale up to
    16 kHz and overlap so that every bin is shared out completely.
    """
    top = dsp.N_FFT // 2
    with torch.device("cpu"):  # a constant, also where a model is built without memory
        steps = torch.arange(1, bands - linear + 1) / (bands - linear)
        centres = torch.cat([torch.arange(linear), (linear - 1) * (top / (linear - 1)) ** steps])
        bins = torch.arange(top + 1, dtype=torch.float32)
        upper = torch.bucketize(bins, centres[1:-1], right=True) + 1
        share = ((bins - centres[upper - 1]) / (centres[upper] - centres[upper - 1])).clamp(0, 1)
        matrix = torch.zeros(bands, top + 1)
        matrix[upper, bins.long()] = share
        matrix[upper - 1, bins.long()] = 1 - share
    return matrix


class Front(nn.Module):
    """Log band energies of a spectrum, brought to a common level so that loud and soft inputs look alike."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        matrix = band_matrix(config.bands, config.linear_bands)
        self.register_buffer("matrix", matrix / matrix.sum(1, keepdim=True), persistent=False)
        self.matrix: Tensor

    def forward(self, power: Tensor) -> Tensor:
        """`power`: float32 `[batch, frames, 513]`. Returns float32 `[batch, 1, frames, bands]`, about unit range."""
        return self.compress(power @ self.matrix.T, power.sum(-1).mean(-1))

    def compress(self, bands: Tensor, energy: Tensor) -> Tensor:
        """Compute `forward` from the `bands` of the power and the `energy` of a mean frame, `[batch]`."""
        # RMS of the signal to within a constant: |X|² sums to N_FFT/2 · 3/8 · N_FFT · rms² a frame (Hann window).
        level = energy / (3 / 16 * dsp.N_FFT**2)
        gain = 1 / level.clamp(min=SILENCE_RMS**2)
        return ((torch.log1p(bands * (gain * 10)[:, None, None]) - 2) / 2)[:, None]


class Residual(nn.Module):
    """Two 3×3 convolutions; FiLM (paper III-C: γ(c)·x + β(c), here with γ around 1) before the second activation."""

    def __init__(self, channels: int, query: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.film = nn.Linear(query, 2 * channels) if query else None

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.film is not None:
            gain, bias = self.film(query)[:, :, None, None].chunk(2, 1)
            h = h * (1 + gain) + bias
        return F.relu(h + x)


class Bottleneck(nn.Module):
    """A bidirectional GRU over time, on all bands at once: `[batch, channels, frames, bands]` in and out."""

    def __init__(self, width: int, hidden: int, query: int) -> None:
        super().__init__()
        self.film = nn.Linear(query, width)
        self.gru = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, width)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        b, c, t, f = x.shape
        h = x.permute(0, 2, 1, 3).reshape(b, t, c * f) * (1 + self.film(query)[:, None])
        added: Tensor = self.out(self.gru(h)[0])
        return x + added.view(b, t, c, f).permute(0, 2, 1, 3)


class Mini(base.MaskSeparator):
    """Separates by positive and negative conditions. Its features are log band energies alone."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        c, q = config.channels, config.query
        self.config = config
        self.rate = dsp.RATE_HZ
        self.window = config.seconds * dsp.RATE_HZ
        self.step = 2 ** len(c)  # frames are padded to a multiple of this
        self.front = Front(config)
        self.register_buffer("spread", band_matrix(config.bands, config.linear_bands), persistent=False)
        self.spread: Tensor
        self.query = nn.Sequential(nn.Linear(2 * config.dim, q), nn.ReLU(), nn.Linear(q, q), nn.ReLU())
        self.stem = nn.Conv2d(1, c[0], (4, 8), stride=(2, 4), padding=(1, 2))
        self.down = nn.ModuleList(Residual(n, q) for n in c)
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(c))
        self.bottleneck = Bottleneck(config.bands // 4 // 2 ** (len(c) - 1) * c[-1], config.hidden, q)
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(c))
        self.lateral = nn.ModuleList(nn.Conv2d(n, n, 1) for n in c[:-1])
        self.up = nn.ModuleList(Residual(n, q) for n in c[:-1])
        self.head = nn.ConvTranspose2d(c[0], config.fine, (4, 8), stride=(2, 4), padding=(1, 2))
        self.fine = nn.Sequential(
            nn.Conv2d(config.fine + 1, config.fine, 3, padding=1), nn.ReLU(), nn.Conv2d(config.fine, 1, 3, padding=1)
        )
        self.dtype = torch.float32  # in which it computes
        self.register_load_state_dict_post_hook(_lay_out)  # type: ignore[no-untyped-call]

    def encode(self, mixture: Tensor) -> Tensor:
        return self.pad(self.front(dsp.power(dsp.spectrum(mixture))))

    def pad(self, bands: Tensor) -> Tensor:
        """Pad frames to a multiple of what the network halves: `[batch, 1, frames, bands]` in and out."""
        return F.pad(bands, (0, 0, 0, -bands.shape[2] % self.step))

    def lower(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def mask(self, features: Tensor, condition: Tensor) -> Tensor:
        frames = self.window // dsp.HOP + 1
        laid_out = features.contiguous(memory_format=torch.channels_last)
        with torch.autocast(features.device.type, self.dtype, enabled=self.dtype != torch.float32):
            mask = self.band_mask(laid_out, condition)
        return mask[:, :frames].float() @ self.spread

    def band_mask(self, bands: Tensor, condition: Tensor) -> Tensor:
        """`bands`: `[batch, 1, frames, bands]`; returns the mask per band, `[batch, frames, bands]`."""
        # A condition has length 1; at unit variance it drives the first layer from the start of training.
        query: Tensor = self.query(condition * math.sqrt(condition.shape[1]))
        bands = bands.expand(max(len(bands), len(query)), -1, -1, -1)
        x, skips = self.stem(bands), []
        for level, block in enumerate(self.down):
            x = block(self.halve[level - 1](x) if level else x, query)
            skips.append(x)
        x = self.bottleneck(x, query)
        for level in reversed(range(len(self.up))):
            x = F.interpolate(self.narrow[level](x), scale_factor=2) + self.lateral[level](skips[level])
            x = self.up[level](x, query)
        return torch.sigmoid(self.fine(torch.cat([F.relu(self.head(x)), bands], 1)))[:, 0]


def _lay_out(net: nn.Module, _: object) -> None:
    """Lay kernels out with their channels last, as a CPU convolves them faster by a quarter."""
    for parameter in net.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


# Words that say nothing of a sound; they count where a text has no others.
FUNCTION_WORDS = "a an the this that some of in on at by with from to into and or is are was being"
EMPTY_WORDS = frozenset(f"{FUNCTION_WORDS} sound sounds recording recordings".split())
CARRIERS = frozenset(("noise", "noises", "audio", "clip", "sample"))  # are empty before "of": "the noise of rain"


def essential(words: Sequence[str]) -> list[str]:
    """Return the words that say what sounds: "rain" of "the sound of rain"; all words where none does."""
    followed = zip(words, [*words[1:], ""], strict=True)
    kept = [word for word, after in followed if word not in EMPTY_WORDS and not (word in CARRIERS and after == "of")]
    return kept or list(words)


class MiniText(base.TextEncoder):
    """Embeds a text as the mean vector of its `essential` words; words outside the table are ignored."""

    def __init__(self, config: MiniConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.register_buffer("table", torch.zeros(config.words, config.dim, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(config.words, dtype=torch.float16))
        self.table: Tensor
        self.scale: Tensor

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed each text; raises `QueryError` for one without a known word."""
        return torch.stack([self._embed(text) for text in texts])

    def _embed(self, text: str) -> Tensor:
        words = self._words(text)
        ids = self._known(essential(words)) or self._known(words)
        if not ids:
            meant = " ".join(f"did you mean {near!r}?" for near in self.unknown(text).values() if near)
            advice = meant or "describe the sound in plain English"
            raise QueryError(f"the model 'mini' knows no word of the query {text!r}: {advice}")
        vectors = self.table[ids].float() * self.scale[ids, None].float()
        return F.normalize(vectors.mean(0), dim=0)

    def _words(self, text: str) -> list[str]:
        """Split a text into words, in the tokenizer's spelling."""
        normal = self.tokenizer.normalizer.normalize_str(text)
        return [word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(normal)]

    def _known(self, words: Sequence[str]) -> list[int]:
        ids = map(self.tokenizer.token_to_id, words)
        return [i for i in ids if i is not None and i < len(self.table)]

    def unknown(self, text: str) -> dict[str, str | None]:
        """Return the words of a text that are not in the table and so ignored, each with the nearest that is.

        Single letters are left out.
        """
        spelt = re.findall(r"[^\W\d_]+", text)
        return {word: self._nearest(word.lower()) for word in spelt if self._is_unknown(word)}

    def _is_unknown(self, word: str) -> bool:
        pieces = self._words(word)
        whole = "".join(pieces) == word.lower() and len(self._known(pieces)) == len(pieces)
        return not whole and not (len(word) == 1 and word.isascii())

    def _nearest(self, word: str) -> str | None:
        """Return the known word nearest in spelling; of equals the same first letter, then the most frequent."""
        ends = {other for other in self._vocabulary if other[0] == word[0] or other[-1] == word[-1]}
        close = [other for other in ends if abs(len(other) - len(word)) <= 2]

        def alike(other: str) -> tuple[bool, float, bool, int]:
            pairs = ((word, other), (sorted(word), sorted(other)))
            ratio = sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
            return sorted(word) == sorted(other), ratio, word[0] == other[0], -self._vocabulary[other]

        return max(difflib.get_close_matches(word, close, NEAR_WORDS, NEAR), key=alike, default=None)

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        """Return the known words with their numbers, which are small for frequent ones."""
        return {word: number for word, number in self.tokenizer.get_vocab().items() if number < len(self.table)}


class MiniAudio(base.AudioEncoder):
    """Embeds recordings in the word space, by convolutions over log band energies."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        c = config.audio_channels
        self.config = config
        self.rate = dsp.RATE_HZ
        self.window = config.seconds * dsp.RATE_HZ
        self.front = Front(config)
        self.stem = nn.Conv2d(1, c[0], 8, stride=4, padding=2)
        self.blocks = nn.ModuleList(Residual(n, 0) for n in c)
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(c))
        width = config.bands // 4 // 2 ** (len(c) - 1) * c[-1]
        self.mix = nn.Linear(width, 2 * c[-1])
        self.out = nn.Sequential(nn.Linear(4 * c[-1], 2 * c[-1]), nn.ReLU(), nn.Linear(2 * c[-1], config.dim))

    def forward(self, power: Tensor) -> Tensor:
        """`power`: float32 `[batch, frames, 513]`. Returns `[batch, dim]`, rows of length 1."""
        x = self.front(power)
        x = self.stem(F.pad(x, (0, 0, 0, -x.shape[2] % 2 ** (len(self.blocks) + 1))))
        for level, block in enumerate(self.blocks):
            x = block(self.halve[level - 1](x) if level else x)
        h = F.relu(self.mix(x.permute(0, 2, 1, 3).flatten(2)))
        return F.normalize(self.out(torch.cat([h.mean(1), h.amax(1)], 1)).float(), dim=-1)

    @torch.no_grad()
    def embed(self, audio: Tensor) -> Tensor:
        """Embed a recording: the mean over as few stretches as cover it."""
        length = STRETCH_SECONDS * self.rate
        count = max(1, -(-len(audio) // length))
        audio = F.pad(audio, (0, max(0, length - len(audio))))
        starts = [round(i * (len(audio) - length) / max(count - 1, 1)) for i in range(count)]
        windows = torch.stack([audio[start : start + length] for start in starts])
        return F.normalize(self(dsp.power(dsp.spectrum(windows))).mean(0), dim=0)
