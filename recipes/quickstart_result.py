"""Print what a quickstart run came to: a few lines for people, then one JSON object on the last line."""

import json
from pathlib import Path

from watch import read_metrics, val_accuracy

from rema_verl.errors import Parser, UserError, die


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    args = parser.parse_args()

    steps = read_metrics(args.run / "metrics")
    accuracy = {step: a for step in sorted(steps) if (a := val_accuracy(steps[step])) is not None}
    if 0 not in accuracy or args.steps not in accuracy:
        raise UserError(f"{args.run / 'metrics'}: no validation at step 0 and step {args.steps}")
    checkpoint = args.run / "checkpoints" / f"global_step_{args.steps}"
    print(
        f"held-out accuracy  {accuracy[0]:.1%} before, {accuracy[args.steps]:.1%} after {args.steps} steps (synthetic)"
    )
    print("at steps           " + ", ".join(f"{step}: {a:.1%}" for step, a in accuracy.items()))
    print(f"checkpoint         {checkpoint}")
    print(f"metrics            {args.run / 'metrics'} (verl's JSON lines, one file per launch)")
    print(f"trajectories       {args.run}/{{rollouts,validation}} (both roles, a file per step)")
    print("the real recipe    python data_prep/build_math.py && bash recipes/rema_llama8b_math.sh   (8 GPUs)")
    print(
        json.dumps(
            {
                "accuracy_before": round(accuracy[0], 4),
                "accuracy_after": round(accuracy[args.steps], 4),
                "accuracy": {str(step): round(a, 4) for step, a in accuracy.items()},
                "steps": max(steps),
                "seconds": args.seconds,
                "run_dir": str(args.run),
                "checkpoint": str(checkpoint),
                "synthetic": True,
            }
        )
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        die(e)
