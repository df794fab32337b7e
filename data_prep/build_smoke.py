"""Build what SMOKE=1 runs a recipe on: a few real rows and a tiny model that answers some of them.

    python data_prep/build_smoke.py --train data/math/train.parquet --val data/math/val.parquet --out data/smoke

The rows are the shortest questions of the recipe's own files. The model (0.4 M parameters, byte-level tokenizer) is
fitted for some seconds on two-turn dialogues about these rows, half of them with a wrong answer, so that rewards
differ and two optimiser steps have something to follow. It can do nothing else, and nothing it scores means anything.
"""

import random
from pathlib import Path

import pyarrow as pa
from _common import Parser, UserError, positive_int, read_rows, run_main, sha256_file, source_files, write_outputs
from build_tiny import FINISH, build_model, build_tokenizer


def shortest_rows(path: Path, count: int) -> list[dict]:
    """The ``count`` rows of a verl RL file with the shortest questions, in file order."""
    rows = [row for file in source_files(path) for _, row in read_rows(file)]
    for number, row in enumerate(rows, start=1):
        if not row.get("prompt") or (row.get("reward_model") or {}).get("ground_truth") in (None, ""):
            raise UserError(f"{path}: row {number}: needs 'prompt' and 'reward_model.ground_truth' (verl's RL format)")
    ranked = sorted(range(len(rows)), key=lambda i: (len(str(rows[i]["prompt"])), i))
    return [rows[i] for i in sorted(ranked[:count])]


def dialogues(rows: list[dict], rng: random.Random, count: int) -> list[list[dict[str, str]]]:
    """Both roles' views of ``count`` two-turn dialogues about the rows; every second answer is wrong."""
    from rema_verl.dialogue import META_THINKING, REASONING, Dialogue

    truths = [row["reward_model"]["ground_truth"] for row in rows]
    chats = []
    for i in range(count):
        row = rows[i % len(rows)]
        dialogue = Dialogue(row["prompt"][-1]["content"], max_turns=2)
        answer = row["reward_model"]["ground_truth"] if rng.random() < 0.5 else rng.choice([*truths, "0"])
        for message in ("Solve it.", "I did.", f"Answer. {FINISH}", f"\\boxed{{{answer}}}"):
            dialogue.add(message)
        chats += [dialogue.view(META_THINKING)[:-1], dialogue.view(REASONING)]
    return chats


def fit(model, tokenizer, chats: list[list[dict[str, str]]], steps: int, batch: int, rng: random.Random) -> float:
    """Plain supervised steps on the assistant tokens; the last loss."""
    import torch

    assistant, end = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.eos_token_id
    examples = []
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        speaking, labels = False, []
        for token in ids:
            labels.append(token if speaking else -100)
            speaking = token == assistant or (speaking and token != end)
        examples.append((torch.tensor(ids), torch.tensor(labels)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pad = torch.nn.utils.rnn.pad_sequence
    for _ in range(steps):
        ids, labels = zip(*rng.sample(examples, batch), strict=True)
        mask = pad([torch.ones_like(i) for i in ids], batch_first=True)
        ids, labels = pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("data/smoke"))
    parser.add_argument("--rows", type=positive_int, default=8, help="questions in each split")
    parser.add_argument("--steps", type=positive_int, default=150, help="supervised steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    manifest = {
        "made_for": "SMOKE=1",
        "seed": args.seed,
        "rows": args.rows,
        "steps": args.steps,
        "sources": {str(path): sha256_file(path) for path in (args.train, args.val) if path.is_file()},
    }
    splits = {"train": shortest_rows(args.train, args.rows), "val": shortest_rows(args.val, args.rows)}
    rng = random.Random(args.seed)
    chats = dialogues(splits["train"], rng, count=64)
    tokenizer = build_tokenizer(["\n".join(m["content"] for m in chat) for chat in chats], vocabulary=1024)
    model = build_model(tokenizer, args.out / "model", args.seed, hidden=128, layers=2, tie=True)
    loss = fit(model, tokenizer, chats, args.steps, batch=8, rng=rng)
    model.save_pretrained(args.out / "model")
    tables = {f"{name}.parquet": pa.Table.from_pylist(rows) for name, rows in splits.items()}
    write_outputs(args.out, tables, manifest)
    print(f"smoke model and {2 * args.rows} real rows in {args.out} (supervised loss {loss:.2f})")


if __name__ == "__main__":
    run_main(main)
