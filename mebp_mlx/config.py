"""TrainConfig: every option of a training run. The only source of flags, YAML keys, defaults and saved JSON.

Names follow mlx-lm where it has them, and its YAML files (`lora_parameters`, `lr_schedule`, ...) are understood.
Flags override the YAML file, which overrides a resumed run's options, which override the defaults.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mebp_mlx import mlx_lm_options
from mebp_mlx.data.rows import ALL, COMPLETION, OVERLONG, TRAIN_ON, RowOptions
from mebp_mlx.errors import UserError
from mebp_mlx.model.families import CLASSIC, LORA_KEYS
from mebp_mlx.options import (
    build_parser,
    checked_value,
    convert,
    describe,
    option,
    read_yaml,
    size_option,
    suggest,
)
from mebp_mlx.system.group import TIMEOUT_S
from mebp_mlx.system.limits import SMALLEST, UNLIMITED, named_budget
from mebp_mlx.system.phone import DEVICES, Phone
from mebp_mlx.weights.hub import FEATURES, SLICES

PROG = "python -m mebp_mlx.train"
_SHORT = [key.rpartition(".")[2] for key in LORA_KEYS]
SHORT_KEYS = {short: key for short, key in zip(_SHORT, LORA_KEYS, strict=True) if _SHORT.count(short) == 1}
SHORT_KEYS |= {key.rpartition(".")[2]: key for key in CLASSIC}
OPTIMIZERS = ("adam", "adamw", "sgd", "muon", "adafactor", "lion", "adamax", "adagrad", "adadelta", "rmsprop")
ZEROTH_ORDER = ("mezo", "kzoo", "hizoo", "fzoo")
SERVICES = {"wandb": "wandb", "tensorboard": "tensorboardX", "trackio": "trackio", "swanlab": "swanlab"}  # libraries
SCHEDULES = ("cosine_decay", "linear_schedule", "exponential_decay", "step_decay")

DATA, METHOD, LORA, OPTIMIZER, LENGTH, SEVERAL, REPORT = (
    "model and data",
    "method",
    "LoRA",
    "optimizer",
    "length of the run",
    "several machines (mlx.launch)",
    "reports and files",
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """mlx-lm's `lr_schedule`: a schedule of mlx.optimizers, its arguments, and `warmup` updates before it."""

    name: str = option(None, OPTIMIZER, "function of mlx.optimizers", choices=SCHEDULES)
    arguments: tuple[float, ...] = option(None, OPTIMIZER, "its arguments, the highest rate first")
    warmup: int = option(0, OPTIMIZER, "updates of warm-up", at_least=0, below=2**31)
    warmup_init: float = option(0.0, OPTIMIZER, "rate of the first update", at_least=0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The checked options of a run. Raises UserError naming the flag. `epochs`, if given, replaces `iters`."""

    # fmt: off
    model: str = option("bundled", DATA, "folder, hub id, or `bundled`: the small model in the package")
    data: str = option("bundled", DATA, "folder with train/valid/test.jsonl, hub id, or `bundled`")
    hf_dataset: tuple[Mapping[str, Any], ...] | None = option(
        None, DATA, "datasets on the hub instead of data, as in mlx-lm", yaml_only=True, may_change=True)
    mask_prompt: bool = option(False, DATA, "the same as --train-on completion, as in mlx-lm")
    train_on: str | None = option(None, DATA, "labels: all, the completion (last message), or every assistant turn",
                                  choices=TRAIN_ON, shown_default="all")
    prompt_feature: str = option("prompt", DATA, "key of a row's prompt", metavar="KEY", may_change=True)
    completion_feature: str = option("completion", DATA, "key of a row's completion", metavar="KEY", may_change=True)
    text_feature: str = option("text", DATA, "key of a row's text", metavar="KEY", may_change=True)
    chat_feature: str = option("messages", DATA, "key of a row's messages", metavar="KEY", may_change=True)
    preview: int = option(0, DATA, "print N rows with the labelled text marked, then stop", at_least=0,
                          may_change=True)
    max_seq_length: int = option(2048, DATA, "longest row in tokens; memory grows with it", at_least=2)
    overlong: str = option("truncate", DATA, "what to do with a longer row: truncate, drop or error",
                           choices=OVERLONG)
    batch_size: int = option(4, DATA, "rows per micro-batch; memory grows with rows x longest row", at_least=1)

    engine: str = option("mebp", METHOD, "mebp, whole-graph: exact; mezo, kzoo, hizoo, fzoo: forward passes only",
                         choices=("mebp", "whole-graph", *ZEROTH_ORDER))
    zo_eps: float = option(1e-2, METHOD, "zeroth order: step length along a random direction", metavar="X", above=0)
    kzoo_seeds: int = option(4096, METHOD, "kzoo: size of the pool of directions", at_least=1, below=10**7)
    kzoo_pro: bool = option(False, METHOD, "kzoo: draw directions that gave large slopes more often")
    hizoo_alpha: float = option(1e-8, METHOD, "hizoo: weight of a step's curvature; 0 gives mezo", at_least=0, below=1)
    fzoo_samples: int = option(8, METHOD, "fzoo: directions per step, one forward pass each", at_least=2, below=10**6)
    dtype: str = option("auto", METHOD, "to compute in; auto: the checkpoint's on a GPU, float32 on the CPU",
                        choices=("auto", "float32", "bfloat16", "float16"))
    weights: str = option("auto", METHOD, "packed: multiply as stored; decompressed: block by block (faster on a CPU)",
                          choices=("auto", "packed", "decompressed"))
    arena_dir: str | None = option(None, METHOD, "folder for kept values that do not fit in memory",
                                   path=True, may_change=True, shown_default="temporary")
    memory_budget: int | str | None = size_option(
        METHOD, "footprint limit, such as 500MB; min: smallest; none", words=(SMALLEST, UNLIMITED),
        may_change=True, shown_default="1GB, at most 1/4 of memory")
    over_budget: str = option("stop", METHOD, "if the peak exceeds the budget: save and stop (exit 3), or warn",
                              choices=("stop", "warn"), may_change=True)
    arena_budget: int | None = size_option(METHOD, "disk space for kept values; less: more is recomputed",
                                           may_change=True, shown_default="2GB; long rows up to 5GB")
    device: str | None = option(None, METHOD, "simulate a phone: an app's memory limit, a projection of its speed",
                                choices=tuple(DEVICES), may_change=True, shown_default="this machine")
    dry_run: bool = option(False, METHOD, "print the predicted footprint, then stop", may_change=True)
    seed: int = option(0, METHOD, "for LoRA's initial values, data order, dropout and noise", at_least=0, below=2**63)

    fine_tune_type: str = option("lora", LORA, "lora, or dora: also row norms, for one more product per projection",
                                 choices=("lora", "dora"), refused={"full": mlx_lm_options.FULL})
    rank: int = option(8, LORA, "rank of a LoRA pair: 4 bytes per parameter, and again for each copy kept",
                       at_least=1, below=2**31)
    scale: float = option(20.0, LORA, "factor of the LoRA product")
    rslora_alpha: float | None = option(None, LORA, "rsLoRA: the scale is X / sqrt(rank), instead of --scale",
                                        above=0, shown_default="by --scale")
    dropout: float = option(0.0, LORA, "on the input of every LoRA pair; no memory is kept for it",
                            at_least=0, below=1)
    keys: tuple[str, ...] | None = option(None, LORA, "projections that get a LoRA pair (q_proj is enough)",
                                          choices=LORA_KEYS, aliases=SHORT_KEYS, metavar="KEY", shown_default="all")
    num_layers: int = option(-1, LORA, "only the last N layers (fewer: less memory and time), -1 for all",
                             at_least=1, or_minus_one=True)
    resume_adapter_file: str | None = option(None, LORA, "adapters (ours or mlx-lm's) that a new run starts from",
                                             metavar="FILE", path=True, shown_default="none")

    optimizer: str | None = option(None, OPTIMIZER, "LoRA copies kept: 2 adam, adamw; 1 lion, muon; 0 sgd",
                                   choices=OPTIMIZERS, shown_default="adam; sgd with zeroth order")
    optimizer_config: Mapping[str, Any] = option({}, OPTIMIZER, "{name: {argument: value}}, as in mlx-lm",
                                                 yaml_only=True)
    learning_rate: float = option(1e-4, OPTIMIZER, "the highest rate, after warm-up and before decay", above=0)
    lora_plus_ratio: float = option(1.0, OPTIMIZER, "LoRA+: factor between the rates of B and A", above=0)
    warmup: int = option(0, OPTIMIZER, "updates over which the rate rises from 0", at_least=0, below=2**31)
    lr_decay: str = option("constant", OPTIMIZER, "constant, or cosine or linear down to 0 at the end",
                           choices=("constant", "cosine", "linear"))
    lr_schedule: Mapping[str, Any] | None = option(
        None, OPTIMIZER, "{name, arguments, warmup, warmup_init}, as in mlx-lm", yaml_only=True)
    max_grad_norm: float | None = option(None, OPTIMIZER, "clip gradients to this norm; keeps one LoRA copy",
                                         above=0, shown_default="no clipping")
    grad_accumulation_steps: int = option(1, OPTIMIZER, "micro-batches per update; above 1 keeps one LoRA copy",
                                          at_least=1, below=10**6)

    iters: int = option(150, LENGTH, "micro-batches to train on, as in mlx-lm (not updates); 0: --test only",
                        at_least=0, may_change=True)
    epochs: float | None = option(None, LENGTH, "passes over the training rows, instead of --iters", above=0,
                                  may_change=True, shown_default="by --iters")
    steps_per_eval: int = option(200, LENGTH, "iterations between validations", at_least=1, may_change=True)
    val_batches: int = option(25, LENGTH, "batches per validation, -1 for all, 0 for none", at_least=0,
                              or_minus_one=True, may_change=True)
    patience: int | None = option(None, LENGTH, "early stopping: end after N validations without improvement",
                                  at_least=1, may_change=True, shown_default="never")
    min_delta: float = option(0.0, LENGTH, "by how much a validation's loss must fall to be better", at_least=0,
                              may_change=True)
    test: bool = option(False, LENGTH, "evaluate the test rows at the end", may_change=True)
    test_batches: int = option(500, LENGTH, "batches of that test, -1 for all", at_least=1, or_minus_one=True,
                               may_change=True)

    rows_by_speed: bool = option(False, SEVERAL, "divide rows by each machine's measured speed, not evenly",
                                 may_change=True)
    reduce_dtype: str = option("float32", SEVERAL, "of gradients in transit; bfloat16: half the bytes, rounded sums",
                               choices=("float32", "bfloat16"), may_change=True)
    peer_timeout: float = option(TIMEOUT_S, SEVERAL, "seconds to wait for another machine before ending", above=0,
                                 below=10**6, may_change=True)

    adapter_path: str = option("adapters", REPORT, "folder for everything that a run writes", path=True,
                               may_change=True)
    resume: bool = option(False, REPORT, "continue the run in --adapter-path, with its options", may_change=True)
    save_every: int = option(100, REPORT, "iterations between saves", at_least=1, may_change=True)
    save_best: bool = option(False, REPORT, "keep the adapters of the best validation in best/; so does --patience",
                             may_change=True)
    steps_per_report: int = option(10, REPORT, "iterations between reports", at_least=1, may_change=True)
    sample_prompt: str | None = option(None, REPORT, "text to continue at the end, without and with LoRA",
                                       metavar="TEXT", may_change=True, shown_default="none")
    report_to: tuple[str, ...] | None = option(None, REPORT, "send reports to wandb, tensorboard, trackio, swanlab",
                                               choices=tuple(SERVICES), may_change=True, shown_default="none")
    project_name: str | None = option(None, REPORT, "project of --report-to", may_change=True,
                                      shown_default="the folder's name")
    config: str | None = option(None, REPORT, "YAML file of options; flags override it", path=True,
                                flags=("-c",), may_change=True, shown_default="none")
    # fmt: on

    def __post_init__(self) -> None:
        for spec in describe(type(self)).values():
            try:
                value = convert(spec, getattr(self, spec.name))
            except ValueError as error:
                raise UserError(f"{spec.flag}: {error}") from None
            object.__setattr__(self, spec.name, value)
        object.__setattr__(self, "lr_schedule", _checked_schedule(self.lr_schedule, _dotted))
        _check_optimizer_config(self.optimizer_config, _dotted)
        if self.mask_prompt and self.train_on not in (None, COMPLETION):
            raise UserError(f"--train-on {self.train_on}: contradicts --mask-prompt, which means --train-on completion")
        _check_sets(self.hf_dataset, _dotted)
        if not self.iters and self.epochs is None and not self.test:
            raise UserError("--iters: 0 trains nothing; with --test it evaluates the model and the adapters")
        if self.lr_schedule is not None and (self.warmup or self.lr_decay != "constant"):
            raise UserError("--warmup, --lr-decay: cannot be combined with lr_schedule, which sets both")

    @property
    def optimizer_name(self) -> str:
        """The optimizer's name: as given, else sgd for zeroth order and adam for exact gradients."""
        return self.optimizer or ("sgd" if self.engine in ZEROTH_ORDER else "adam")

    @property
    def tracks_best(self) -> bool:
        """Whether the best validation is kept in best/."""
        return self.save_best or self.patience is not None

    def iteration(self, step: int) -> int:
        """The iteration after `step` updates; iterations are micro-batches."""
        return step * self.grad_accumulation_steps

    @property
    def lora_scale(self) -> float:
        """The factor of the LoRA product: scale, or rsLoRA's alpha / sqrt(rank) (Kalajdzievski 2023)."""
        return self.scale if self.rslora_alpha is None else self.rslora_alpha / math.sqrt(self.rank)

    @property
    def data_source(self) -> str | list[dict[str, Any]]:
        """The source of rows: hf_dataset if given, else data."""
        return self.data if self.hf_dataset is None else [dict(each) for each in self.hf_dataset]

    @property
    def row_options(self) -> RowOptions:
        """How rows are read."""
        return RowOptions(
            train_on=self.train_on or (COMPLETION if self.mask_prompt else ALL),
            max_seq_length=self.max_seq_length,
            overlong=self.overlong,
            prompt_feature=self.prompt_feature,
            completion_feature=self.completion_feature,
            text_feature=self.text_feature,
            chat_feature=self.chat_feature,
        )

    @property
    def phone(self) -> Phone | None:
        """The phone given by --device."""
        return None if self.device is None else DEVICES[self.device]

    @property
    def budget_bytes(self) -> int | None:
        """The limit of the footprint: --memory-budget, else an app's limit on --device, else 1 GB or a quarter of the
        machine's memory, whichever is less. None if the budget is `none` or `min` (see `smallest`).
        """
        if self.memory_budget is None and self.phone is not None:
            return self.phone.budget_bytes
        return named_budget(self.memory_budget)[0]

    @property
    def smallest(self) -> bool:
        """Whether --memory-budget is min: the smallest footprint at any speed."""
        return named_budget(self.memory_budget)[1]

    @classmethod
    def from_args(cls, argv: Sequence[str] | None = None, saved: Mapping[str, Any] | None = None) -> TrainConfig:
        """Merges flags, YAML, `saved` (a resumed run's options) and defaults. Raises UserError; --help exits."""
        flags, taken = _from_flags(argv)
        given, more = _from_yaml(flags["config"]) if "config" in flags else ({}, [])
        if "hf_dataset" in given and "data" in flags:
            raise UserError(f"--data: cannot be combined with the hf_dataset of {flags['config']}, which replaces it")
        if (taken or more) and saved is None:
            print(mlx_lm_options.notice(list(dict.fromkeys([*taken, *more]))), flush=True)
        if "lr_schedule" in given and (unused := sorted(flags.keys() & {"warmup", "lr_decay", "learning_rate"})):
            flag = describe(cls)[unused[0]].flag
            raise UserError(f"{flag}: cannot be combined with the lr_schedule of {flags['config']}, which sets it")
        for newer in (given, flags):
            if "iters" in newer and "epochs" in newer:
                raise UserError("--epochs: cannot be combined with --iters")
            if "scale" in newer and "rslora_alpha" in newer:
                raise UserError("--rslora-alpha: cannot be combined with --scale, which it replaces")
        if "iters" in flags:
            given.pop("epochs", None)
        if "scale" in flags:
            given.pop("rslora_alpha", None)
        return cls.over({**given, **flags}, saved or {})

    @classmethod
    def over(cls, given: Mapping[str, Any], saved: Mapping[str, Any]) -> TrainConfig:
        """Merges the given options over those of the resumed run. Raises UserError."""
        own = ("resume", "config", "adapter_path")  # never from the saved run, whose folder may have been moved
        known = {name: value for name, value in saved.items() if name not in own}
        if unknown := sorted(known.keys() - describe(cls).keys()):
            raise UserError(f"--resume: the saved run has an option that this version does not know: {unknown[0]}")
        if "iters" in given:
            known.pop("epochs", None)
        return cls(**{**known, **given})

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        defaults = TrainConfig()
        return {name: v for name in describe(TrainConfig) if (v := getattr(self, name)) != getattr(defaults, name)}

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-ready values, by field name; `optimizer` is the optimizer_name."""
        sets = None if self.hf_dataset is None else self.data_source
        return {
            **dataclasses.asdict(self),
            "hf_dataset": sets,
            "keys": None if self.keys is None else list(self.keys),
            "report_to": None if self.report_to is None else list(self.report_to),
            "optimizer": self.optimizer_name,
        }

    def replace(self, **changes: Any) -> TrainConfig:
        """A checked copy with some options changed."""
        return dataclasses.replace(self, **changes)

    def fixed_by_run(self) -> dict[str, Any]:
        """The options that determine a run's results; a resumed run may not change them."""
        may_change = {spec.name for spec in describe(type(self)).values() if spec.option.may_change}
        return {name: value for name, value in self.to_dict().items() if name not in may_change}


# Flags


def _from_flags(argv: Sequence[str] | None) -> tuple[dict[str, Any], list[str]]:
    """The given options, and the names of mlx-lm's options that are accepted but have no effect."""
    parser = build_parser(
        TrainConfig,
        PROG,
        "Fine-tune a language model with exact LoRA gradients in little memory.",
        "Without options it trains the bundled model on the bundled text. YAML files use the same names with _,\n"
        "and mlx-lm's lora_parameters, lr_schedule and optimizer_config. Memory is the process footprint.\n"
        "exit codes: 0 done, 1 another machine is gone, 2 wrong option or input, 3 memory budget cannot be met or\n"
        "was exceeded (saved), 130 interrupted and saved",
    )
    mlx_lm_options.add_flags(parser)
    raw_values, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    specs = describe(TrainConfig)
    if unknown:
        flag = unknown[0].partition("=")[0]
        flags = [spec.flag for spec in specs.values() if not spec.option.yaml_only]
        raise UserError(f"{flag}: no such option{suggest(flag, flags)}")
    given, taken = {}, []
    for name, raw in vars(raw_values).items():
        if name in specs:
            given[name] = checked_value(specs[name], raw, specs[name].flag)
        elif name == "use_dora":
            given.setdefault("fine_tune_type", "dora")
        elif name == "wandb":  # older mlx-lm: the project's name
            given.setdefault("report_to", ("wandb",))
            given.setdefault("project_name", raw)
        elif mlx_lm_options.is_taken(name, raw, mlx_lm_options.flag(name)):
            taken.append(name)
    return given, taken


# YAML

Where = Callable[..., str]  # where(outer_key, inner_key) -> the start of an error message


def _dotted(*keys: str) -> str:
    return ".".join(keys)


def _from_yaml(path: str) -> tuple[dict[str, Any], list[str]]:
    """The options in a YAML file (this trainer's and mlx-lm's), and the names of those that have no effect.

    A key whose value is null counts as absent.
    """
    file = read_yaml(path)
    specs = describe(TrainConfig)
    given: dict[str, Any] = {}
    taken: list[str] = []

    def take(name: str, raw: Any, where: str) -> None:
        if name in given:
            raise UserError(f"{where}: given twice, also at the top level")
        if raw is not None:
            if specs[name].option.size and type(raw) in (int, float):
                raw = f"{raw:.20g}"  # a number in a file has no unit, as on the command line
            given[name] = checked_value(specs[name], raw, where)

    for key, raw in file.values.items():
        where = file.where(key)
        if key in specs and key != "config":
            take(key, raw, where)
        elif key == "use_dora" and raw is True:
            take("fine_tune_type", "dora", where)
        elif key == "wandb" and isinstance(raw, str):  # older mlx-lm: the project's name
            take("report_to", "wandb", where)
            take("project_name", raw, where)
        elif key in mlx_lm_options.FOREIGN:
            if mlx_lm_options.is_taken(key, raw, where):
                taken.append(key)
        elif key != "lora_parameters":
            if raw is not None:
                raise UserError(f"{where}: unknown key{suggest(key, [*specs, 'lora_parameters'])}")
            taken.append(key)
    for key, raw in _lora_parameters(file.values.get("lora_parameters") or {}, file.where).items():
        take(key, raw, file.where("lora_parameters", key))
    _checked_schedule(given.get("lr_schedule"), file.where)
    _check_optimizer_config(given.get("optimizer_config", {}), file.where)
    _check_sets(file.values.get("hf_dataset"), file.where)
    if "lr_schedule" in given and (extra := given.keys() & {"warmup", "lr_decay"}):
        raise UserError(f"{file.where(min(extra))}: cannot be combined with lr_schedule, which has both")
    return given, taken


def _lora_parameters(nested: Any, where: Where) -> dict[str, Any]:
    """mlx-lm's lora_parameters, whose keys are names of options."""
    if not isinstance(nested, dict):
        raise UserError(f"{where('lora_parameters')}: expected a mapping, got {nested!r}")
    _only_keys(nested, ("rank", "scale", "dropout", "keys"), where, "lora_parameters")
    return nested


def _only_keys(mapping: Mapping[Any, Any], known: Sequence[str], where: Where, *outer: str) -> None:
    for key in mapping:
        if key not in known:
            hint = "; mlx-lm and this trainer use `scale`" if key == "alpha" else suggest(str(key), known)
            raise UserError(f"{where(*outer, str(key))}: unknown key{hint}")


def _checked_schedule(schedule: Mapping[str, Any] | None, where: Where) -> dict[str, Any] | None:
    """mlx-lm's lr_schedule, converted to the types that the schedules need."""
    if schedule is None:
        return None
    specs = describe(Schedule)
    _only_keys(schedule, list(specs), where, "lr_schedule")
    checked = {
        key: checked_value(spec, schedule.get(key, spec.default), where("lr_schedule", key))
        for key, spec in specs.items()
    }
    return {**checked, "arguments": list(checked["arguments"])}


def _check_sets(sets: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None, where: Where) -> None:
    """Checks mlx-lm's hf_dataset: one dataset, or a list of them."""
    features, splits = [f"{key}_feature" for key in FEATURES], [f"{split}_split" for split in SLICES]
    is_one = isinstance(sets, Mapping)
    for number, each in enumerate([sets] if isinstance(sets, Mapping) else sets or ()):
        outer = ("hf_dataset",) if is_one else ("hf_dataset", str(number))
        for key, value in each.items():
            if key not in ("path", "config", *features, *splits):
                hint = "; mlx-lm calls it path" if key == "name" else suggest(str(key), ["config", *features, *splits])
                raise UserError(f"{where(*outer, str(key))}: unknown key{hint}")
            if not isinstance(value, Mapping if key == "config" else str):
                raise UserError(f"{where(*outer, str(key))}: expected {'a mapping' if key == 'config' else 'text'}")
        if "path" not in each:
            raise UserError(f"{where(*outer)}: needs a path, the name of a dataset on the hub")


def _check_optimizer_config(config: Mapping[str, Any], where: Where) -> None:
    """Checks mlx-lm's optimizer_config: {optimizer: {argument: value}}. make_optimizer checks the arguments."""
    _only_keys(config, OPTIMIZERS, where, "optimizer_config")
    for name, arguments in config.items():
        if not isinstance(arguments, Mapping):
            raise UserError(f"{where('optimizer_config', name)}: expected a mapping, got {arguments!r}")
