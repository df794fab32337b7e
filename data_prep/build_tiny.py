"""Build the synthetic tiny task: a two-role arithmetic dialogue that a 0.4 M-parameter model learns on two CPU cores.

    python data_prep/build_tiny.py --out data/tiny

SYNTHETIC: made for tests and the quickstart, not a benchmark of anything.

The question is a chain of one-digit numbers, worked from left to right, modulo 5. ``meta_thinking`` names the next
step, ``reasoning`` computes it; the last step carries ``[FINISH]`` and its answer is boxed:

    question       3+4*4-2
    meta_thinking  3+4           reasoning  2
    meta_thinking  2*4           reasoning  3
    meta_thinking  3-2 [FINISH]  reasoning  \\boxed{1}

The cold-start dialogues carry a bad habit for RL to unlearn: on long questions the planner finishes with the first step
more often than not, which makes the boxed answer wrong. The right behaviour is in the data, only rarer.

Written to ``--out``: ``model/`` (random weights, own tokenizer and chat template), ``sft.parquet`` (both roles' views,
verl's SFT format), ``train.parquet`` and ``val.parquet`` (verl's RL format, no question in common), ``manifest.json``.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from _common import Parser, positive_int, run_main, write_outputs

FINISH = "[FINISH]"
# what the recipes pass as rema.prompts: short, so that rows stay short
PROMPTS = {"meta_thinking": "plan", "reasoning": "solve", "first_instruction": "{question}|{instruction}"}
MODULUS = 5  # few enough facts to learn in two minutes
LONG = 4  # operands of a long question; a short one has one fewer
EARLY = {3: 0.3, 4: 0.6}  # operands -> probability that the planner finishes with the very first step
SHARE_LONG = 0.7
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def draw_question(rng: random.Random) -> tuple[list[int], list[str]]:
    """Numbers and the operators between them."""
    n = LONG if rng.random() < SHARE_LONG else LONG - 1
    return [rng.randrange(MODULUS) for _ in range(n)], [rng.choice("+-*") for _ in range(n - 1)]


def text_of(numbers: list[int], operators: list[str]) -> str:
    return str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(operators, numbers[1:], strict=True))


def apply(a: int, operator: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % MODULUS


def answer_of(numbers: list[int], operators: list[str]) -> int:
    value = numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        value = apply(value, operator, number)
    return value


def draw_dialogue(numbers: list[int], operators: list[str], rng: random.Random) -> list[str]:
    """Messages m1, r1, m2, r2, ...; may finish too early."""
    messages, value = [], numbers[0]
    for i, (operator, number) in enumerate(zip(operators, numbers[1:], strict=True)):
        last = i == len(operators) - 1 or (i == 0 and rng.random() < EARLY[len(numbers)])
        step, value = f"{value}{operator}{number}", apply(value, operator, number)
        messages += [f"{step} {FINISH}", f"\\boxed{{{value}}}"] if last else [step, str(value)]
        if last:
            return messages
    raise AssertionError("unreachable: the last operator always finishes")


def sft_rows(question: str, messages: list[str]) -> list[list[dict[str, str]]]:
    """Both roles' views of a dialogue, as chats."""
    from rema_verl.dialogue import META_THINKING, REASONING, Dialogue, Prompts

    dialogue = Dialogue(question, max_turns=len(messages), finish_flag=FINISH, prompts=Prompts(**PROMPTS))
    for message in messages:
        dialogue.add(message)
    # the planner's view would show it reasoning's boxed answer, which it never gets to answer
    return [dialogue.view(META_THINKING)[:-1], dialogue.view(REASONING)]


def rl_row(numbers: list[int], operators: list[str], split: str, index: int) -> dict:
    return {
        "data_source": "tiny_arithmetic_synthetic",
        "prompt": [{"role": "user", "content": text_of(numbers, operators)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(answer_of(numbers, operators))},
        "extra_info": {"split": split, "index": index, "operands": len(numbers)},
    }


def build_tokenizer(corpus: Sequence[str], vocabulary: int = 320, pre_tokenizer=None):
    """Byte-level BPE: any text can be encoded. By default a digit is one token wherever it stands."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def build_model(
    tokenizer,
    out: Path,
    seed: int,
    hidden: int,
    layers: int,
    tie: bool = False,
    kind: str = "llama",
    spread: float = 0.02,
):
    """A randomly initialised causal LM beside its tokenizer. head_dim is 32, the least vLLM's CPU attention takes.

    ``spread`` is the standard deviation of the initial weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config_cls, model_cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    config = config_cls(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=tie,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = model_cls(config).float()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=positive_int, default=2048, help="RL questions")
    parser.add_argument("--val", type=positive_int, default=200, help="held-out questions")
    parser.add_argument("--sft", type=positive_int, default=16_000, help="cold-start dialogues")
    parser.add_argument("--hidden", type=positive_int, default=128)
    parser.add_argument("--layers", type=positive_int, default=2)
    args = parser.parse_args(argv)
    import pyarrow as pa

    rng = random.Random(args.seed)
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {"val": [], "train": []}
    for split, rows in splits.items():
        while len(rows) < getattr(args, split):
            question = draw_question(rng)
            if (text := text_of(*question)) not in seen:
                seen.add(text)
                rows.append(rl_row(*question, split=split, index=len(rows)))
    held_out = {row["prompt"][0]["content"] for row in splits["val"]}

    sft: list[dict] = []
    for dialogue in range(args.sft):
        while text_of(*(question := draw_question(rng))) in held_out:
            pass
        plan, solve = sft_rows(text_of(*question), draw_dialogue(*question, rng))
        # the planner copies, reasoning has 75 facts to learn: it gets two rows for each of the planner's
        sft += [{"messages": chat} for chat in ((plan, solve) if dialogue % 2 else (solve,))]
    rng.shuffle(sft)

    tokenizer = build_tokenizer(
        ["".join(f"{m['role']} {m['content']}\n" for m in row["messages"]) for row in sft[:4000]]
    )
    # with transformers' own spread of 0.02 so small a model still gets facts wrong after the cold start, on some seeds
    model = build_model(tokenizer, args.out / "model", args.seed, args.hidden, args.layers, spread=0.05)
    write_outputs(
        args.out,
        {f"{name}.parquet": pa.Table.from_pylist(rows) for name, rows in {**splits, "sft": sft}.items()},
        {
            "synthetic": True,
            "task": "left-to-right arithmetic modulo 5 in two-role dialogue",
            "seed": args.seed,
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": len(tokenizer),
            "prompts": PROMPTS,
        },
    )


if __name__ == "__main__":
    run_main(main)
