"""The tensors of a checkpoint, checked against the config; infers the packing of each matrix."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from ..weights.safetensors import MappedWeights
from .config import FLOAT_MODES, Linear, Quantization


class Tensors:
    """Checks the checkpoint's tensors against the config, and infers the packing of each matrix."""

    def __init__(self, weights: MappedWeights, config: dict, where: str):
        self.weights, self.where = weights, where
        self.quantized = config.get("quantization") or config.get("quantization_config")
        self.read: list[str] = []

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.weights:
            raise UserError(f"{self.where} requires the tensor {name}, which the checkpoint does not have")
        return tuple(self.weights.info(name).shape)

    def _expect(self, name: str, want: tuple[int, ...]) -> None:
        shape = self._shape(name)
        if shape != want:
            file = self.weights.info(name).file.name
            raise UserError(f"{file}: {name} has shape {list(shape)}, but {self.where} requires {list(want)}")
        self.read.append(name)

    def vector(self, name: str, size: int) -> str:
        self._expect(name, (size,))
        return name

    def linear(self, name: str, out_dims: int, in_dims: int, bias: bool = False) -> Linear:
        if bias:
            self._expect(f"{name}.bias", (out_dims,))
        if f"{name}.scales" not in self.weights:
            self._expect(f"{name}.weight", (out_dims, in_dims))
            return Linear(name, out_dims, in_dims, bias)
        return Linear(name, out_dims, in_dims, bias, self._packing(name, (out_dims,), in_dims))

    def experts(self, name: str, apart: str, shape: tuple[int, int, int], bias: bool = False) -> Linear:
        """A stack [experts, out, in], or the experts' own matrices. Raises UserError if their packings differ."""
        n_experts, out_dims, in_dims = shape
        if self.has(name) or not self.has(apart.format(0)):
            if bias:
                self._expect(f"{name}.bias", (n_experts, out_dims))
            packing = None
            if f"{name}.scales" in self.weights:
                packing = self._packing(name, (n_experts, out_dims), in_dims)
            else:
                self._expect(f"{name}.weight", shape)
            return Linear(name, out_dims, in_dims, bias, packing, n_experts=n_experts)
        own = [self.linear(apart.format(index), out_dims, in_dims, bias) for index in range(n_experts)]
        if odd := next((linear for linear in own if linear.quantization != own[0].quantization), None):
            raise UserError(f"{self.where}: {odd.name} and {own[0].name} are packed differently")
        return Linear(name, out_dims, in_dims, bias, own[0].quantization, n_experts=n_experts, apart=apart)

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a matrix of that name."""
        return f"{name}.weight" in self.weights

    def taps(self, name: str, channels: int, n_taps: int) -> bool:
        """Checks a depthwise kernel, [channels, taps, 1] or torch's [channels, 1, taps]; returns whether torch's."""
        is_torchs = n_taps > 1 and self._shape(name) == (channels, 1, n_taps)
        self._expect(name, (channels, 1, n_taps) if is_torchs else (channels, n_taps, 1))
        return is_torchs

    def refuse_unread(
        self, prefix: str, tied_head: str | None, ignored: Sequence[str] = (), ignored_ends: Sequence[str] = ()
    ) -> None:
        """Raises UserError for a decoder tensor that nothing reads: the loss would be a different model's.

        Frequency buffers are allowed, since frequencies are computed; so is the head of a tied embedding, which is a
        copy. ignored, ignored_ends: prefixes and suffixes of other allowed names.
        """
        spare = [] if tied_head is None else [f"{tied_head}.{part}" for part in ("weight", "scales", "biases")]
        known, ends = {*self.read, *spare}, (".inv_freq", *ignored_ends)
        for name in self.weights.names:
            if name in known or name.endswith(ends) or name.startswith(tuple(ignored)):
                continue
            if name.startswith(("model.", "lm_head", f"{prefix}model.", f"{prefix}lm_head")):
                file = self.weights.info(name).file.name
                raise UserError(f"{file}: nothing reads the tensor {name}, so {self.where} describes a different model")

    def _packing(self, name: str, rows: tuple[int, ...], in_dims: int) -> Quantization:
        """Infers bits and group size from the shapes; those in config.json must agree."""
        said: dict = self.quantized if isinstance(self.quantized, dict) else {}
        own = said.get(name, said)
        packed, scales = self._shape(f"{name}.weight"), self._shape(f"{name}.scales")
        bits = packed[-1] * 32 // in_dims
        group_size = in_dims // scales[-1] if scales[-1] else 0
        mode = self._mode(name, own if isinstance(own, dict) else {}, bits, group_size)
        self._expect(f"{name}.weight", (*rows, in_dims * bits // 32))
        self._expect(f"{name}.scales", (*rows, in_dims // group_size if group_size else 0))
        if mode == "affine":
            self._expect(f"{name}.biases", (*rows, in_dims // group_size))
        if bits not in (2, 3, 4, 5, 6, 8) or not group_size or in_dims % group_size:
            raise UserError(f"{name}: {bits} bits in groups of {group_size} over {in_dims} inputs cannot be unpacked")
        named = isinstance(own, dict) and own is not said and "bits" in own
        if named and (own["bits"], own.get("group_size", group_size)) != (bits, group_size):
            raise UserError(
                f"{self.where}: {name} should have {own['bits']} bits in groups of {own.get('group_size')}, "
                f"but its shapes give {bits} bits in groups of {group_size}"
            )
        return Quantization(bits, group_size, mode)

    def _mode(self, name: str, own: dict, bits: int, group_size: int) -> str:
        """The mode of the tensors. Raises UserError if config.json names a different or an unsupported one.

        Byte scales belong to one of FLOAT_MODES, each of which has one number of bits and one group size.
        """
        method = own.get("quant_method")
        said = own.get("mode") or (method if method in FLOAT_MODES else None)
        if said is not None and said not in ("affine", *FLOAT_MODES):
            known = ", ".join(("affine", *FLOAT_MODES))
            raise UserError(f"{self.where}: quantization mode {said!r} of {name} is not supported: {known}")
        if self.weights.info(f"{name}.scales").dtype != "U8":
            mode = "affine"
        else:
            mode = next((mode for mode, shape in FLOAT_MODES.items() if shape == (bits, group_size)), "unknown")
        if mode == "unknown" or said not in (None, mode):
            what = f"{bits} bits in groups of {group_size}" + (" with byte scales" if mode != "affine" else "")
            named = f"should be {said}, but " if said is not None else ""
            raise UserError(f"{self.where}: {name} {named}has {what}, {mode if named else 'which no mode has'}")
        return mode
