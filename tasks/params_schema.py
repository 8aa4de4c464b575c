"""The sections of params.yaml: every key with its type, range and default (which works on digits).

Units and ranges are in params.yaml beside the values. The fields of methods are not here: they are
the methods' own dataclasses (see methods.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator

from heal.naming import AUTO

if TYPE_CHECKING:
    from heal.values import Budget


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="at most 128 letters, digits, dots, dashes and underscores, beginning with a letter or digit",
    ),
]
Text = Annotated[str, Field(min_length=1)]
Colour = tuple[float, float, float]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="one of auto, cpu, cuda, cuda:N")]


class Section(BaseModel):
    """One section: frozen, no unknown keys, no silent conversions, only finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class MethodSection(Section):
    """A section that also holds one mapping of params for each method, under the method's name."""

    model_config = ConfigDict(extra="allow")

    def options(self, method: str) -> dict[str, JsonValue]:
        """The method's params as given (after checking: as completed with its defaults)."""
        given = (self.model_extra or {}).get(method)
        return dict(given) if isinstance(given, dict) else {}


class Preprocessing(Section):
    """What replaces the model's own preprocessing; null keeps it."""

    size: Annotated[tuple[Count, Count], Field(description="[height, width]")] | None = None
    resize: Count | None = None
    crop: Literal["center", "squash"] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    mean: Colour | None = None
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = (
        None
    )


ModelSource = Annotated[
    str,
    Field(
        pattern=r"^(timm:[\w.-]+|file:.+|bundle:.+|models:/[^/@]+(/\d+|@[\w-]+)|adapter:[\w.]+:\w+)$",
        description="one of timm:NAME, file:PATH, bundle:PATH, models:/NAME@ALIAS, models:/NAME/VERSION, "
        "adapter:package.module:function",
    ),
]


class Dense(Section):
    source: ModelSource = "models:/digits-vit@dense"
    if_missing: Literal["train", "refuse"] = "train"
    seed: Seed = 0
    architecture: Text | None = None
    architecture_args: dict[str, JsonValue] = {}
    adapter_allow: tuple[Text, ...] = ()
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing = Preprocessing()

    @field_validator("architecture")
    @classmethod
    def _files_need_an_architecture(cls, architecture: str | None, info: ValidationInfo) -> str | None:
        if str(info.data.get("source")).startswith("file:") and architecture is None:
            raise ValueError("source file:PATH holds weights only; name their architecture, for example resnet18")
        return architecture

    @field_validator("adapter_allow")
    @classmethod
    def _adapters_are_allowed(cls, allowed: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for value in (info.data.get("source"), info.data.get("architecture")):
            adapter = str(value).removeprefix("adapter:")
            if str(value).startswith("adapter:") and adapter not in allowed:
                raise ValueError(f"{value} runs your code; allow it with dense.adapter_allow: ['{adapter}']")
        return allowed


ImageSource = Annotated[
    str,
    Field(
        pattern=r"^(digits|imagefolder:.+|parquet:.+|hf:[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}(:[\w.-]+)?)$",
        description="one of digits, imagefolder:PATH, parquet:PATH, hf:NAME@COMMIT[:SPLIT] (COMMIT: 40 hex digits)",
    ),
]


class Calibration(Section):
    source: ImageSource = "digits"
    count: Count = 512
    seed: Seed = 0
    corrupt: Literal["refuse", "skip"] = "refuse"
    max_skipped: Share = 0.01
    labels: bool = False


class Activations(Section):
    batch_size: Count = 64
    device: Device = "auto"


class AskedBudget(Section):
    """The budget as written; exactly one of the four."""

    weights: float | None = None
    neurons: float | None = None
    macs: float | None = None
    blocks: float | None = None

    def build(self) -> Budget:
        """The library's budget. Raises BudgetError."""
        from heal.values import Budget

        return Budget(weights=self.weights, neurons=self.neurons, macs=self.macs, blocks=self.blocks)


class Allocation(MethodSection):
    method: str = AUTO
    budget: AskedBudget = AskedBudget(neurons=0.5)
    seed: Seed = 0
    device: Device = "auto"


class Pruning(MethodSection):
    method: str = AUTO


class Healing(MethodSection):
    methods: Annotated[tuple[str, ...], Field(min_length=1)] = (AUTO,)
    rounds: Count = 1
    seed: Seed = 0
    device: Device = "auto"

    @field_validator("methods")
    @classmethod
    def _each_healer_once(cls, named: tuple[str, ...]) -> tuple[str, ...]:
        for method in named:
            if named.count(method) > 1:
                raise ValueError(f"{method} is named twice; name each healer once")
        for alone in ("none", AUTO):
            if alone in named and len(named) > 1:
                raise ValueError(f"{alone} stands alone; drop it or the others")
        return named


class Evaluation(Section):
    source: ImageSource = "digits"
    labels: bool | Text = True
    subsets: Text | None = None
    batch_size: Count = 64
    device: Device = "auto"
    latency_rounds: Annotated[int, Field(ge=0)] = 30
    latency_batches: tuple[Count, ...] = (1, 32)
    latency_models: tuple[Text, ...] = ("dense", "healed")


class Report(Section):
    title: Text | None = None


class Registration(Section):
    name: Name = "digits-vit"
    licence: Text | None = None


class Promotion(Section):
    max_drop_dense: Share | None = 0.02
    max_drop_champion: Share | None = 0.02
    min_agreement: Share | None = 0.9
    max_bytes: Count | None = None
    max_macs: Count | None = None
    min_speedup: Annotated[float, Field(gt=0)] | None = None


class Sections(Section):
    """All of params.yaml."""

    dense: Dense = Dense()
    calibration: Calibration = Calibration()
    activations: Activations = Activations()
    allocation: Allocation = Allocation()
    pruning: Pruning = Pruning()
    healing: Healing = Healing()
    evaluation: Evaluation = Evaluation()
    report: Report = Report()
    registration: Registration = Registration()
    promotion: Promotion = Promotion()
