"""Build the synthetic task for MPDF's frozen agents: arithmetic with slips, a critic and a second attempt.

    python data_prep/build_tiny_mpdf.py --out data/tiny_mpdf

SYNTHETIC: made for tests and the quickstart, not a benchmark of anything. How good a solver, a critic and a second
attempt are is written into the supervised data below; the model learns it as a distribution and samples from it.

The question is a chain of the digits 0 to 4, worked from left to right. ``+`` stops at 4, ``-`` is the distance and
``*`` is modulo 5: in each table a digit alone says something about the result, so that a tiny model learns it soon
(in sums modulo 5 it says nothing, and they are learnt much later):

    question     3*4-2
    solve        3*4=2;2-2=0 \\boxed{0}, then the profile   a product is wrong half of the time, mostly by one
    critic       3*4=2;2-2=0, then the verdict             works it out again with few slips, and compares
    refine       as solve, with fewer slips                does not look at the first attempt: it mends and it breaks
    debate       as refine                                 the same skill, whatever the others say
    act          an action, any as likely                  for the LLM as its own meta-policy
    practice     eight steps of a long chain, no slips     never asked for: it teaches the tables, which slips hide

So agents disagree, a vote often falls for the shared slip, and the critic knows more than the solver.

Written to ``--out``: ``model/`` (random weights, own tokenizer), ``sft.parquet`` (verl's SFT format), ``train.parquet``
and ``val.parquet`` (verl's RL format, no question in common), ``prompts.json`` (for --prompts), ``manifest.json``.
"""

import itertools
import random
from pathlib import Path

from _common import Parser, UserError, positive_int, run_main, write_outputs
from build_tiny import MODULUS, build_model, build_tokenizer, rl_row, text_of

PROMPTS = {kind: kind for kind in ("solve", "critic", "refine", "vanilla", "cot", "debate", "act")}  # short rows
OPERANDS = 3
PRACTICE = 9  # operands of a practice row
OPERATORS = "+-**"  # as often as they stand here
VOCABULARY = 640  # tokens
AGENTS = 3  # whose solutions a debate shows
# probability of a slip, by operator
SOLVE = {"+": 0.1, "-": 0.1, "*": 0.5}
AGAIN = {"+": 0.1, "-": 0.1, "*": 0.4}  # refine and debate
CHECK = {"+": 0.04, "-": 0.04, "*": 0.08}  # the critic's own calculation
NEVER = dict.fromkeys(OPERATORS, 0.0)
SHARED = 0.75  # of the slips are off by one, the rest by anything
AGREES = (0.02, 0.05, 0.1, 0.28, 0.55)  # how often each verdict is given where the critic's result is the same
# shares of the rows
KINDS = {"solve": 8, "critic": 8, "refine": 6, "cot": 1, "vanilla": 1, "debate": 3, "act": 1, "practice": 8}

Question = tuple[list[int], list[str]]


def apply(a: int, operator: str, b: int) -> int:
    return {"+": min(a + b, MODULUS - 1), "-": abs(a - b), "*": a * b % MODULUS}[operator]


def work_out(question: Question, slips: dict[str, float], rng: random.Random) -> tuple[str, int]:
    """The chain as text, and its result."""
    numbers, operators = question
    value, steps = numbers[0], []
    for operator, number in zip(operators, numbers[1:], strict=True):
        result = apply(value, operator, number)
        if rng.random() < slips[operator]:
            result = (result + (1 if rng.random() < SHARED else rng.randrange(1, MODULUS))) % MODULUS
        steps.append(f"{value}{operator}{number}={result}")
        value = result
    return ";".join(steps), value


def solution(question: Question, slips: dict[str, float], rng: random.Random, profile: bool = True) -> str:
    """A solution as an agent writes it. It is less sure of itself the more products there are."""
    text, value = work_out(question, slips, rng)
    text += f" \\boxed{{{value}}}"
    if not profile:
        return text
    sure = (90, 60, 30)[min(question[1].count("*"), 2)]
    return f"{text}\nPROFILE: steps={len(question[1])}; ops=arithmetic; confidence={sure}"


def verdict(question: Question, text: str, rng: random.Random) -> str:
    """A critic's reply about a solution."""
    from rema_verl.deliberation.protocol import VERDICTS, parse_solution

    steps, value = work_out(question, CHECK, rng)
    theirs = parse_solution(text).answer
    agrees = theirs == str(value)
    found = "same" if agrees else "different"  # spelt out for a tiny model
    return f"{steps} {value} {found} {theirs}\nVERDICT: {rng.choices(VERDICTS, AGREES if agrees else AGREES[::-1])[0]}"


def practice(rng: random.Random) -> list[dict[str, str]]:
    """A long chain, worked out without a slip."""
    question = [rng.randrange(MODULUS) for _ in range(PRACTICE)], rng.choices(OPERATORS, k=PRACTICE - 1)
    steps, _ = work_out(question, NEVER, rng)
    contents = {"system": "practice", "user": text_of(*question), "assistant": steps}
    return [{"role": role, "content": content} for role, content in contents.items()]


def chat(kind: str, question: Question, rng: random.Random) -> list[dict[str, str]]:
    """One call and its reply."""
    from rema_verl.deliberation.protocol import ACTIONS, Prompts, messages, show, show_peers

    if kind == "practice":
        return practice(rng)
    profile = kind != "debate" or rng.random() < 0.5  # debaters show profiles in the first round alone
    texts = [solution(question, rng.choice([SOLVE, AGAIN]), rng, profile) for _ in range(AGENTS)]
    values = {"question": text_of(*question), "solution": texts[0], "confidence": show(rng.randrange(5) / 4)}
    values["peers"] = show_peers(texts[1:], [rng.randrange(5) / 4 for _ in texts[1:]] if kind == "act" else None)
    if kind == "critic":
        reply = verdict(question, texts[0], rng)
    elif kind == "act":
        action = rng.choice(ACTIONS)
        reply = f"<action>{action}</action>" + (solution(question, AGAIN, rng) if action == "refine" else "")
    elif kind == "vanilla":
        reply = f"\\boxed{{{work_out(question, SOLVE, rng)[1]}}}"
    else:
        slips = AGAIN if kind in ("refine", "debate") else SOLVE
        reply = solution(question, slips, rng, profile=kind in ("solve", "refine"))
    return [*messages(kind, Prompts(**PROMPTS), **values), {"role": "assistant", "content": reply}]


def all_questions(rng: random.Random) -> list[Question]:
    """Every question once, in random order, those with products more often early."""
    weights = {o: OPERATORS.count(o) for o in OPERATORS}
    found = [
        (list(numbers), list(operators))
        for numbers in itertools.product(range(MODULUS), repeat=OPERANDS)
        for operators in itertools.product(weights, repeat=OPERANDS - 1)
    ]

    # Efraimidis and Spirakis: a weighted order without replacement
    def place(question: Question) -> float:
        weight = 1
        for operator in question[1]:
            weight *= weights[operator]
        return rng.random() ** (1 / weight)

    return sorted(found, key=place, reverse=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/tiny_mpdf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=positive_int, default=600, help="questions to deliberate on")
    parser.add_argument("--val", type=positive_int, default=300, help="held-out questions")
    parser.add_argument("--sft", type=positive_int, default=24_000, help="supervised calls")
    parser.add_argument("--hidden", type=positive_int, default=256)
    parser.add_argument("--layers", type=positive_int, default=2)
    args = parser.parse_args(argv)
    import pyarrow as pa
    from tokenizers import Regex, pre_tokenizers

    rng = random.Random(args.seed)
    questions = all_questions(rng)
    if args.train + args.val > len(questions):
        raise UserError(f"--train {args.train} and --val {args.val}: there are only {len(questions):,} questions")
    held_out, rest = questions[: args.val], questions[args.val :]
    splits: dict[str, list[dict]] = {"train": [], "val": []}
    for name, some in (("train", rest[: args.train]), ("val", held_out)):
        for i, question in enumerate(some):
            row = rl_row(*question, split=name, index=i)
            row["data_source"] = "tiny_mpdf_synthetic"
            row["reward_model"]["ground_truth"] = str(work_out(question, NEVER, rng)[1])
            splits[name].append(row)
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=args.sft)
    sft = [{"messages": chat(kind, rng.choice(rest), rng), "kind": kind} for kind in kinds]

    # Digits and operators are tokens of their own; the text between them is as few tokens as its frequency allows. A
    # message each: what the template puts between them is special tokens.
    pieces = [
        pre_tokenizers.Split(Regex(r"[0-9+*-]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    messages = [message["content"] for row in sft[:6000] for message in row["messages"]]
    tokenizer = build_tokenizer(messages, VOCABULARY, pre_tokenizers.Sequence(pieces))
    model = build_model(tokenizer, args.out / "model", args.seed, args.hidden, args.layers, spread=0.06)
    write_outputs(
        args.out,
        {f"{name}.parquet": pa.Table.from_pylist(rows) for name, rows in {**splits, "sft": sft}.items()},
        {
            "synthetic": True,
            "task": "left-to-right arithmetic on the digits 0 to 4 with slips, for MPDF",
            "seed": args.seed,
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": len(tokenizer),
            "slips": {"solve": SOLVE, "refine": AGAIN, "critic": CHECK, "off_by_one": SHARED},
        },
        {"prompts.json": PROMPTS},
    )


if __name__ == "__main__":
    run_main(main)
