"""Stages 1 and 2: train a meta-policy on a corpus. Seconds to minutes on a CPU; no LLM is called.

    python -m rema_verl.deliberation.train --stage supervised --corpus DIR --out sft.safetensors
    python -m rema_verl.deliberation.train --stage softrankpo --corpus DIR --init sft.safetensors --out mpdf.safetensors

``--init`` is where training starts and, frozen, the reference pi_ref of the losses (:mod:`.objectives`). Beside the
output, OUT.json records how it was made. With the same seed, corpus and thread count the weights are the same.
"""

import argparse
import copy
import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rema_verl import __version__
from rema_verl.deliberation.protocol import ACTIONS
from rema_verl.deliberation.state import SCHEMA
from rema_verl.errors import Parser, UserError, die

if TYPE_CHECKING:  # torch is imported when the command line is right
    import torch

    from rema_verl.deliberation.corpus import States
    from rema_verl.deliberation.policy import MetaPolicy

STAGES = ("supervised", "softrankpo", "expected", "grpo", "ppo")


@dataclass(frozen=True)
class Options:
    """How to train; the defaults are ours, the paper gives tau alone."""

    stage: str = "softrankpo"
    seed: int = 0
    epochs: int = 20
    batch_size: int = 256
    lr: float = 3e-3  # Adam's, linearly to 0
    beta: float = 0.1  # softrankpo: pull to pi_ref; expected, grpo and ppo: weight of KL
    tau: float = 0.5  # softrankpo and expected
    entropy: float = 0.0  # weight of the entropy bonus
    clip: float = 0.2  # grpo and ppo

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage {self.stage!r} is none of {', '.join(STAGES)}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "beta", "tau"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie between 0 and 1, got {self.clip}")
        if not 0 <= self.entropy < float("inf"):
            raise ValueError(f"entropy must not be negative, got {self.entropy}")


def train(
    policy: "MetaPolicy", states: "States", options: Options, on_epoch: Callable[[float], None] = lambda loss: None
) -> list[float]:
    """Train ``policy`` in place; what it is at the beginning is pi_ref.

    Args:
        on_epoch: is told the mean loss of each epoch.

    Returns:
        The mean losses of the epochs.
    """
    import torch

    from rema_verl.deliberation import objectives
    from rema_verl.deliberation.policy import MetaPolicy

    generator = torch.Generator().manual_seed(options.seed)
    reference = copy.deepcopy(policy).eval()
    value = MetaPolicy(policy.hidden, policy.heads, outputs=1, seed=options.seed) if options.stage == "ppo" else None
    target = _target(states.rewards, options)
    with torch.no_grad():
        reference_logits = reference(states.own, states.peers, states.mask)
    networks = [network for network in (policy, value) if network is not None]
    batches = -(-len(states) // options.batch_size)
    optimiser = torch.optim.Adam([p for network in networks for p in network.parameters()], lr=options.lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / (options.epochs * batches))

    policy.train()
    losses = []
    for _ in range(options.epochs):
        if options.stage in ("grpo", "ppo"):
            with torch.no_grad():
                old = policy(states.own, states.peers, states.mask).log_softmax(dim=1)
            drawn = torch.multinomial(old.exp(), 1, generator=generator)
        total = 0.0
        for index in torch.randperm(len(states), generator=generator).split(options.batch_size):
            batch, ref = states.take(index), reference_logits[index]
            logits = policy(batch.own, batch.peers, batch.mask)
            if options.stage == "supervised":
                loss = objectives.supervised_loss(logits, target[index])
            elif options.stage == "softrankpo":
                loss = objectives.softrankpo_loss(logits, ref, target[index], options.beta)
            elif options.stage == "expected":
                loss = objectives.expected_loss(logits, ref, target[index], options.beta)
            elif options.stage == "grpo":
                log_ratio = logits.log_softmax(dim=1) - old[index]
                loss = objectives.clipped_loss(log_ratio, target[index], old[index].exp(), options.clip)
                loss = loss + options.beta * objectives.kl(logits, ref)
            else:
                assert value is not None  # stage ppo
                baseline = value(batch.own, batch.peers, batch.mask)
                error = target[index].gather(1, drawn[index]) - baseline
                advantage = error.detach() - error.detach().mean()
                advantage = advantage / (advantage.square().mean().sqrt() + 1e-6)
                log_ratio = (logits.log_softmax(dim=1) - old[index]).gather(1, drawn[index])
                loss = objectives.clipped_loss(log_ratio, advantage, torch.ones_like(advantage), options.clip)
                loss = loss + 0.5 * error.square().mean() + options.beta * objectives.kl(logits, ref)
            if options.entropy:
                loss = loss - options.entropy * objectives.entropy(logits)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()
            total += loss.item() * len(index)
        losses.append(total / len(states))
        on_epoch(losses[-1])
    policy.eval()
    return losses


def _target(rewards: "torch.Tensor", options: Options) -> "torch.Tensor":
    """(B, K): what the stage makes of the rewards."""
    from rema_verl.deliberation import objectives

    if options.stage == "supervised":
        return objectives.best_actions(rewards)
    if options.stage in ("softrankpo", "expected"):
        return objectives.rank_advantages(rewards, options.tau)
    return objectives.standard_advantages(rewards) if options.stage == "grpo" else rewards.float()


def evaluate(policy: "MetaPolicy", states: "States") -> dict[str, float]:
    """:func:`objectives.scores` of the policy on these states."""
    import torch

    from rema_verl.deliberation import objectives

    with torch.no_grad():
        return objectives.scores(policy(states.own, states.peers, states.mask), states.rewards)


# --- command line ---------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m rema_verl.deliberation.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", required=True, type=Path, help="folder that collect wrote")
    parser.add_argument("--out", required=True, type=Path, help="the meta-policy to write, *.safetensors")
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--init", type=Path, help="meta-policy to start from; stage 2 needs stage 1's")
    parser.add_argument("--hidden", type=int, default=64, help="width of a new meta-policy (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads of a new meta-policy (%(default)s)")
    parser.add_argument(
        "--held-out", type=float, default=0.1, help="share of the questions that is only looked at (%(default)s)"
    )
    defaults = Options()
    for name in ("seed", "epochs", "batch_size"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name), help="%(default)s"
        )
    for name in ("lr", "beta", "tau", "entropy", "clip"):
        parser.add_argument(f"--{name}", type=float, default=getattr(defaults, name), help="%(default)s")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> "tuple[Options, MetaPolicy, States, torch.Tensor, dict]":
    """Everything that a user can get wrong: options, corpus, the file to start from, the place of the output.

    Raises:
        ValueError: one line that names the option or file.
    """
    options = Options(**{name: getattr(args, name) for name in asdict(Options())})
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held-out must lie in [0, 1), got {args.held_out}")
    if args.out.suffix != ".safetensors" or args.out.is_dir():
        raise ValueError(f"--out {args.out}: expected the name of a file that ends in .safetensors")
    if args.init is None and args.stage != "supervised":
        raise ValueError(f"--stage {args.stage} starts from the supervised meta-policy: pass it as --init")
    if args.init is not None and not args.init.is_file():
        raise UserError(f"{args.init}: no such file")
    if not args.corpus.is_dir():
        raise UserError(f"--corpus {args.corpus}: no such folder")
    if not any(args.corpus.glob("part-*.parquet")):
        raise UserError(f"{args.corpus}: an empty corpus (no part-*.parquet in it): collect states first")
    from rema_verl.deliberation import corpus
    from rema_verl.deliberation.policy import MetaPolicy

    policy = MetaPolicy(args.hidden, args.heads, seed=args.seed) if args.init is None else MetaPolicy.load(args.init)
    table = corpus.read(args.corpus)
    states, held_out = corpus.tensors(table), corpus.held_out(table, args.held_out)
    if held_out.all():
        raise ValueError(f"--held-out {args.held_out} leaves no question to train on in {args.corpus}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--out {args.out}: {e.strerror}") from None
    if not os.access(args.out.parent, os.W_OK):
        raise ValueError(f"--out {args.out}: no permission to write there")
    account = {
        "path": str(args.corpus),
        "sha256": corpus.content_hash(table),
        "states": len(states),
        "held_out_states": int(held_out.sum()),
        "trajectories": len(table["trajectory"].unique()),
        "questions": len(table["question_id"].unique()),
    }
    return options, policy, states, held_out, account


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(argv)
        options, policy, states, held_out, account = prepare(args)
    except ValueError as e:
        die(e)
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    init = None if args.init is None else {"path": str(args.init), "sha256": _sha256(args.init)}
    parts = {"train": states.take(~held_out)}
    if held_out.any():
        parts["held_out"] = states.take(held_out)
    before = {name: evaluate(policy, part) for name, part in parts.items()}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} epochs"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task(args.stage, total=options.epochs)
        losses = train(
            policy,
            parts["train"],
            options,
            lambda loss: progress.update(task, advance=1, description=f"{args.stage} loss {loss:.4f}"),
        )
    after = {name: evaluate(policy, part) for name, part in parts.items()}
    for name, part in parts.items():
        print(f"{name}: {len(part):,} states")
        for score in before[name]:
            print(f"  {score:16} {before[name][score]:8.4f} -> {after[name][score]:8.4f}")

    policy.save(args.out)
    manifest = {
        **asdict(options),
        "schema": SCHEMA,
        "actions": ACTIONS,
        "hidden": policy.hidden,
        "heads": policy.heads,
        "corpus": account,
        "init": init,
        "losses": losses,
        "before": before,
        "after": after,
        "sha256": _sha256(args.out),
        "versions": {"rema_verl": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    path = args.out.with_suffix(".json")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    print(f"wrote {args.out} and {path}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
