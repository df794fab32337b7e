"""One table over the evaluations of several seeds: ``python recipes/mpdf_results.py RUN/evaluation/results.json ...``

Every seed counts the same. Intervals are 95 % bootstrap intervals over questions, drawn within each seed: they say
nothing of how seeds differ, which is why each seed's accuracy stands beside them. The last line is one JSON object.
"""

import json
from pathlib import Path

import numpy as np

from rema_verl.errors import Parser, UserError, die

RESAMPLES = 10_000


def accuracies(result: dict, method: str) -> np.ndarray:
    """(questions,) share of correct samples, in the order of their ids."""
    return np.array([np.mean(samples) for _, samples in sorted(result["methods"][method]["correct"].items())])


def pooled(per_seed: list[np.ndarray], rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean over seeds, and its interval."""
    means = [values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1) for values in per_seed]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return float(np.mean([values.mean() for values in per_seed])), float(low), float(high)


def read(argv: list[str] | None = None) -> list[dict]:
    """The files of the command line."""
    parser = Parser(prog="mpdf_results.py", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="RESULTS", help="results.json of an evaluation")
    results = []
    for file in parser.parse_args(argv).files:
        try:
            result = json.loads(Path(file).read_text(encoding="utf-8"))
            results.append({key: result[key] for key in ("compared", "methods", "settings")})
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise UserError(f"{file}: not a readable results.json ({e})") from None
    return results


def main(results: list[dict]) -> None:
    rng = np.random.default_rng(0)
    of = results[0]["compared"]
    methods = [name for name in results[0]["methods"] if all(name in r["methods"] for r in results)]
    print(f"| Method | Accuracy | by seed | {of} is better by | Calls | Tokens | persist / refine / concede |")
    print("|---|---:|---|---:|---:|---:|---:|")
    table = {}
    for name in methods:
        mean, low, high = pooled([accuracies(r, name) for r in results], rng)
        better = pooled([accuracies(r, of) - accuracies(r, name) for r in results], rng)
        rows = [r["methods"][name] for r in results]
        calls, tokens = (float(np.mean([row[key] for row in rows])) for key in ("calls", "total_tokens"))
        rounds = [list(mix.values()) for row in rows for mix in row["actions"]]
        mix = np.mean(rounds, axis=0).tolist() if rounds else []
        seeds = [float(accuracies(r, name).mean()) for r in results]
        table[name] = {"accuracy": mean, "low": low, "high": high, "seeds": seeds, "calls": calls, "tokens": tokens}
        table[name] |= {f"{of}_better_by": better, "actions": mix}
        print(
            f"| {name} | {mean:.1%} [{low:.1%}, {high:.1%}] | {', '.join(f'{s:.1%}' for s in seeds)} | "
            + ("" if name == of else f"{better[0]:+.1%} [{better[1]:+.1%}, {better[2]:+.1%}]")
            + f" | {calls:.1f} | {tokens:,.0f} | {' / '.join(f'{share:.0%}' for share in mix)} |"
        )
    print(json.dumps({"seeds": [r["settings"]["seed"] for r in results], "methods": table}))


if __name__ == "__main__":
    try:
        found = read()
    except UserError as e:
        die(e)
    main(found)
