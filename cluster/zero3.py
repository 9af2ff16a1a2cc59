"""What ZeRO 3 has to be shown of the model, so that a parameter is whole only while something reads it.

DeepSpeed gathers a module's own parameters before the module runs, forward and backward, and lets them go after; it
knows when from the tensors that go in and come out. The model's files know nothing of it; three things are told here:

- an adapter's methods are called, not the adapter: each becomes a module of its own, a `Reader` of what it reads;
- what is read elsewhere than in the module that owns it is named (`_READ_ELSEWHERE`);
- DeepSpeed finds tensors in dicts and not in dataclasses, which are opened before its hooks and closed after them.

What a module reads that no gradient goes on from (fields, projections of tokens, the alignment) is let go at the end of
the backward pass; a factorised readout's maps, which their module hands out as they are, at the step's end.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
from torch import nn

from foundation.model.adapter import Adapter
from foundation.model.encoding_model import EncodingModel
from foundation.model.mamba import Mamba2
from foundation.training.step import TrainingStep

_READS = {
    "roi_values": ("roi_cls", "roi_patch", "roi_field", "roi_bias", "roi_gate", "roi_gate_bias"),
    "roi_tokens": ("roi_embedding",),
    "aligned": ("roi_align",),
    "holistic": ("voxel_component", "voxel_local", "voxel_field", "voxel_bias"),
    "residual": ("voxel_residual", "voxel_bias"),
}
"""What an adapter's methods read: parameters, and modules of parameters."""
_READ_ELSEWHERE = {
    # A block reads its convolution's weights itself. Those of its other parts stay with it to its end: where a block is
    # computed again in the backward pass, a part's hooks would let go of what the backward pass is about to read.
    Mamba2: ("conv1d.weight", "conv1d.bias", "in_proj.weight", "norm.weight", "out_proj.weight"),
    EncodingModel: ("vae.value", "vae.holistic_logit"),
}
_CLASS = "class"


class Reader(nn.Module):
    """A method as a module, with the parameters that it reads."""

    def __init__(self, method: Callable[..., Any], parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.method = method
        for i, parameter in enumerate(parameters):
            self.register_parameter(str(i), parameter)

    def forward(self, *arguments: Any) -> Any:
        """Call the method."""
        return self.method(*arguments)


class ShardedStep(nn.Module):
    """A training step with the readers of its model beside it, for DeepSpeed to find; to be shown to it and `joined`.

    Raises
    ------
    ValueError
        If a subject has low-rank updates of the backbone, which are read in no module.
    """

    def __init__(self, step: TrainingStep) -> None:
        super().__init__()
        self.step = step
        model = step.model
        self.readers = nn.ModuleList(
            reader for subject in model.subjects for reader in _split(model.adapter(subject), subject)
        )
        for module in self._talkers():
            module.register_forward_pre_hook(lambda _, arguments: _opened(arguments))
            module.register_forward_hook(lambda _, __, result: _opened(result))

    def joined(self) -> None:
        """Finish what has to come after DeepSpeed's own hooks."""
        for module in self._talkers():
            module.register_forward_pre_hook(lambda _, arguments: _closed(arguments))
            module.register_forward_hook(lambda _, __, result: _closed(result))
        for module in self.step.modules():
            for name in _READ_ELSEWHERE.get(type(module), ()):
                owner, _, own = name.rpartition(".")
                parameter = getattr(module.get_submodule(owner), own, None)
                if parameter is not None:
                    deepspeed.zero.register_external_parameter(module, parameter)

    def forward(self, *arguments: Any) -> Any:
        """Take the step."""
        return self.step(*arguments)

    def _talkers(self) -> Iterator[nn.Module]:
        """Yield the modules whose arguments or results are dataclasses."""
        model = self.step.model
        yield from (self, self.step, model, model.streams, model.vae, *self.readers)


def _split(adapter: Adapter, subject: str) -> Iterator[Reader]:
    """Route the adapter's methods through readers, and yield those."""
    if adapter.lora is not None:
        raise ValueError(
            f"{subject!r} has low-rank updates, which can't train under ZeRO 3; use --cluster.zero-stage 2"
        )
    left = dict(adapter.named_parameters())
    for name, read in _READS.items():
        of_method = {key: value for key, value in adapter.named_parameters() if key.split(".")[0] in read}
        left = {key: value for key, value in left.items() if key not in of_method}
        reader = Reader(getattr(adapter, name), list(of_method.values()))
        setattr(adapter, name, reader.__call__)
        yield reader
    assert not left, f"no reader knows of {', '.join(left)}"


def _opened(value: Any) -> Any:
    """Return the value with dataclasses turned into dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_CLASS: type(value)} | {key: _opened(field) for key, field in vars(value).items()}
    if isinstance(value, dict):
        return {key: _opened(field) for key, field in value.items()}
    return tuple(_opened(field) for field in value) if isinstance(value, tuple) else value


def _closed(value: Any) -> Any:
    """Return the value with its dataclasses again."""
    if isinstance(value, dict):
        fields = {key: _closed(field) for key, field in value.items() if key != _CLASS}
        return value[_CLASS](**fields) if _CLASS in value else fields
    return tuple(_closed(field) for field in value) if isinstance(value, tuple) else value
