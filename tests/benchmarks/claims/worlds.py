"""Worlds small enough that the best policy's return is known. Each says why the compared variants can differ in it.

Shapes as in learning.py: S seeds, D dialogues of a step, N rows, L tokens, C cells, V tokens to choose from. All of a
world that is drawn (digits, qualities, initial weights) is drawn from the seed. Rows 0 .. D-1 are the planner's
(meta_thinking), D .. 2D-1 reasoning's, dialogue by dialogue. A step has D / SAMPLES questions with SAMPLES dialogues
each; a group is one role of one question, as in trainer mode ``rema``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .learning import Batch, Noise, Tables, choose, log_probs

SAMPLES = 8
PLANNER, REASONING = 0, 1


def two_role_groups(dialogues: int) -> tuple[Tensor, Tensor]:
    """(N,) group and (N,) role of the rows."""
    question = torch.arange(dialogues) // SAMPLES
    role = torch.arange(2).repeat_interleave(dialogues)
    return question.repeat(2) * 2 + role, role


def at_least(wins: int, trials: int, p: float) -> float:
    """P(Binomial(trials, p) >= wins)."""
    return sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(wins, trials + 1))


class Relay:
    """The planner sees a question, reasoning sees only the planner's word: they have to agree on a code.

    States: 8 questions with three digits of 0 .. 3, one to be found a round. Actions: the first token of a message
    counts (the planner's names the digit in a code to be found, reasoning's is the digit); all further tokens are
    filler, drawn from one cell per role. Reward: share of the rounds that end in the right digit. The best policy gets
    1, drawing at random 1/4.

    Why ratios can differ: every filler token moves its cell, so in a long turn the token that counts is one of many.
    Its own ratio is clipped where the turn's mean still stands near 1. ``lengths``: "equal" (8 tokens) or "unequal":
    each turn 1, 2, 4 or 24 tokens, at random, independent of what is said.
    """

    questions, rounds, width, dialogues = 8, 3, 4, 64

    def __init__(self, seeds: Sequence[int], lengths: str = "equal"):
        self.choices = torch.tensor({"equal": [8], "unequal": [1, 2, 4, 24]}[lengths])
        self.digits = Noise(seeds).below(self.width, self.questions, self.rounds)
        self.optimum = torch.ones(len(seeds))
        self.group, self.role = two_role_groups(self.dialogues)

    def start(self) -> Tables:
        cells = self.questions * self.rounds + self.rounds * self.width + 2
        return Tables(torch.zeros(len(self.digits), cells, self.width))

    def play(self, table: Tensor, noise: Noise) -> Batch:
        seeds, d = len(noise), self.dialogues
        question = noise.below(self.questions, d // SAMPLES).repeat_interleave(SAMPLES, dim=1)
        longest, said_first = int(self.choices.max()), self.questions * self.rounds
        filler = said_first + self.rounds * self.width
        width = self.rounds * (longest + 1)
        cells = filler + self.role.view(1, -1, 1).expand(seeds, -1, width).clone()
        length = self.choices[noise.below(len(self.choices), 2 * d, self.rounds)]
        uniform = noise.rand(2 * d, width)
        mask = torch.zeros(seeds, 2 * d, width, dtype=torch.bool)
        right = torch.zeros(seeds, d)
        for t in range(self.rounds):
            start = t * (longest + 1)
            mask[:, :, start : start + longest] = torch.arange(longest) < length[:, :, t, None]
            cells[:, :d, start] = question * self.rounds + t
            word = choose(table, cells[:, :d, start], uniform[:, :d, start])
            cells[:, d:, start] = said_first + t * self.width + word
            digit = choose(table, cells[:, d:, start], uniform[:, d:, start])
            right += digit == self.digits[..., t].gather(1, question)
        tokens = choose(table, cells, uniform)  # the first ones come out as above: same cells, same numbers
        reward = right / self.rounds
        return Batch(
            cells * mask, tokens * mask, mask, reward.repeat(1, 2), self.group, self.role,
            length.sum(dim=2).float(), reward.mean(dim=1),
        )  # fmt: skip


class Handover:
    """The planner can do reasoning's work, but worse.

    States: how many of ``need`` pieces of work are done. Actions, a token a turn: the planner delegates the next piece,
    or does all the rest alone and ends; reasoning works, or keeps silent, and then the planner takes over. A dialogue
    ends with one closing message of each role (free tokens without effect), unless work failed. Reward: 1 for a right
    answer. Work all through is right with probability ``optimum``, taking over with ``alone``: the best policy
    delegates and works always (where alone = 0.8, taking over is as good with "late" and "fast"). At the start both
    roles do their part with such a probability that, if no work failed, half of the dialogues were worked through.

    ``failing`` says what lengths say of rewards: "late": a failure shows at the end, right and wrong dialogues are
    equally long (optimum 0.8); "fast": a piece that fails ends the dialogue, wrong ones are shorter (optimum 0.8);
    "retry": a piece succeeds with 0.75 and is tried again, up to 1.5 * need rounds, wrong ones are longer.

    Why aggregations can differ: silence shortens dialogues. Under 1/T a short dialogue's decision weighs more than each
    of a long one's, so weights and rewards are correlated where lengths and rewards are.
    """

    dialogues = 128

    def __init__(self, seeds: Sequence[int], need: int = 4, failing: str = "late", alone: float = 0.6):
        self.seeds, self.need, self.failing, self.alone = len(seeds), need, failing, alone
        self.limit = need * 3 // 2 if failing == "retry" else need
        self.piece = {"late": 1.0, "fast": 0.8 ** (1 / need), "retry": 0.75}[failing]
        best = at_least(need, self.limit, 0.75) if failing == "retry" else 0.8
        self.optimum = torch.full((len(seeds),), max(best, alone))
        self.group, self.role = two_role_groups(self.dialogues)

    def start(self) -> Tables:
        logits = torch.zeros(self.seeds, 2 * self.need + 2, 2)
        part = 0.5 ** (1 / (2 * self.need))
        logits[:, : 2 * self.need, 0] = math.log(part / (1 - part))
        return Tables(logits)

    def play(self, table: Tensor, noise: Noise) -> Batch:
        seeds, d, need = len(noise), self.dialogues, self.need
        width = 2 * (self.limit + 2)
        cells, tokens = torch.zeros(2, seeds, 2 * d, width, dtype=torch.long)
        mask = torch.zeros(seeds, 2 * d, width, dtype=torch.bool)
        uniform, luck = noise.rand(2 * d, width), noise.rand(d, self.limit + 1)
        done = torch.zeros(seeds, d, dtype=torch.long)
        alive, closing, taken = (torch.zeros(seeds, d, dtype=torch.bool) for _ in range(3))
        alive |= True
        asked, silent, turns = (torch.zeros(seeds, d) for _ in range(3))

        def speak(role: int, t: int, cell: Tensor, who: Tensor) -> Tensor:
            rows = slice(role * d, (role + 1) * d)
            word = choose(table, cell, uniform[:, rows, 2 * t])
            cells[:, rows, 2 * t], tokens[:, rows, 2 * t], mask[:, rows, 2 * t] = cell * who, word * who, who
            return word

        for t in range(self.limit + 2):
            cell = torch.where(closing, 2 * need, done.clamp(max=need - 1))
            alone = (speak(PLANNER, t, cell, alive) == 1) & alive & ~closing
            taken |= alone
            last = closing | alone
            cell = torch.where(last, 2 * need + 1, need + done.clamp(max=need - 1))
            quiet = (speak(REASONING, t, cell, alive) == 1) & alive & ~last
            working = alive & ~last & ~quiet
            asked, silent, turns = asked + (alive & ~last), silent + quiet, turns + alive
            taken |= quiet
            went_well = luck[:, :, min(t, self.limit)] < self.piece
            done = done + (working & went_well)
            alive = alive & ~last
            if self.failing == "fast":
                alive = alive & ~(working & ~went_well)
            closing = alive & (quiet | (done >= need))
            if self.failing == "retry" and t + 1 >= self.limit:
                alive = alive & closing  # out of rounds
        if self.failing == "late":
            finished = (done >= need) & (luck[:, :, self.limit] < 0.8)
        else:
            finished = done >= need
        # the same draw whoever ends it: common random numbers between the arms
        right = torch.where(taken, luck[:, :, self.limit] < self.alone, finished).float()
        seen = {
            "silent": silent.sum(dim=1) / asked.sum(dim=1).clamp(min=1),
            "taken over": taken.float().mean(dim=1),
            "turns": turns.mean(dim=1),
        }
        return Batch(
            cells, tokens, mask, right.repeat(1, 2), self.group, self.role, turns.repeat(1, 2), right.mean(dim=1), seen
        )


class Checks:
    """How long to go on: the planner cannot see progress, and a dialogue that runs out of room gets nothing.

    States: the problem's size (1, 3 or 5 steps) and the round. Actions, a token a turn: the planner goes on or
    finishes; reasoning works with care (a step succeeds with 0.7) or without (0.4). After every round that is not the
    last, the dialogue breaks off with probability 0.05; after 10 rounds it does in any case. Reward: 1 if finished with
    all steps done. The best policy works with care and stops after the number of rounds that maximises
    0.95^(t-1) P(Binomial(t, 0.7) >= size).

    Why the order of rows can matter: broken-off dialogues are the longest and all wrong. In arrival order they fill the
    last mini-batches, whose updates then only ever say "less of this".
    """

    dialogues, limit, sizes, care, carelessness, keeps = 128, 10, (1, 3, 5), 0.7, 0.4, 0.95

    def __init__(self, seeds: Sequence[int]):
        self.seeds = len(seeds)
        best = [self.best_return(size) for size in self.sizes]
        self.optimum = torch.full((len(seeds),), sum(value for value, _ in best) / len(best))
        self.best_turns = sum(self.expected_turns(rounds) for _, rounds in best) / len(best)
        self.group, self.role = two_role_groups(self.dialogues)

    def best_return(self, size: int) -> tuple[float, int]:
        """Return and planned rounds of the best policy."""
        returns = [(self.keeps ** (t - 1) * at_least(size, t, self.care), t) for t in range(1, self.limit + 1)]
        return max(returns)

    def expected_turns(self, rounds: int) -> float:
        return sum(self.keeps**t for t in range(rounds))

    def start(self) -> Tables:
        return Tables(torch.zeros(self.seeds, len(self.sizes) * (self.limit + 1), 2))

    def play(self, table: Tensor, noise: Noise) -> Batch:
        seeds, d = len(noise), self.dialogues
        kind = noise.below(len(self.sizes), d // SAMPLES).repeat_interleave(SAMPLES, dim=1)
        size = torch.tensor(self.sizes)[kind]
        cells, tokens = torch.zeros(2, seeds, 2 * d, 2 * self.limit, dtype=torch.long)
        mask = torch.zeros(seeds, 2 * d, 2 * self.limit, dtype=torch.bool)
        uniform, luck, breaks = noise.rand(2 * d, self.limit), noise.rand(d, self.limit), noise.rand(d, self.limit)
        alive = torch.ones(seeds, d, dtype=torch.bool)
        right, broken, done, turns = (torch.zeros(seeds, d) for _ in range(4))
        for t in range(self.limit):
            said = []
            for role, cell in ((PLANNER, kind * self.limit + t), (REASONING, len(self.sizes) * self.limit + kind)):
                rows = slice(role * d, (role + 1) * d)
                said.append(choose(table, cell, uniform[:, rows, t]))
                cells[:, rows, 2 * t], tokens[:, rows, 2 * t], mask[:, rows, 2 * t] = (
                    cell * alive, said[-1] * alive, alive,
                )  # fmt: skip
            chance = torch.where(said[REASONING] == 0, self.care, self.carelessness)
            done = done + (alive & (luck[:, :, t] < chance))
            turns = turns + alive
            finishes = alive & (said[PLANNER] == 1)
            right = right + (finishes & (done >= size))
            alive = alive & ~finishes
            breaking = alive & ((breaks[:, :, t] > self.keeps) | torch.tensor(t + 1 == self.limit))
            broken = broken + breaking
            alive = alive & ~breaking
        seen = {"turns": turns.mean(dim=1), "unfinished": broken.mean(dim=1)}
        return Batch(
            cells, tokens, mask, right.repeat(1, 2), self.group, self.role, turns.repeat(1, 2), right.mean(dim=1), seen
        )


class Ramble:
    """A planner that rambles silences reasoning: its message is cut off, and reasoning's row holds no token.

    States: 8 questions. Actions: the planner is clear (1 of 4 tokens), vague (1) or rambles (2; reward 0, reasoning
    does not speak); reasoning names the question's digit, one of 4, and can tell questions apart only after a clear
    plan. Reward: 1 for the right digit. The best policy is clear and right: 1. ``silent``: share of rambling at the
    start.

    Why the baseline can matter: counted as 0, silent rows lower reasoning's baseline, so that whatever it says is
    reinforced; left out, its advantages are about what it said.
    """

    dialogues, questions, width = 128, 8, 4

    def __init__(self, seeds: Sequence[int], silent: float = 0.5):
        self.digits = Noise(seeds).below(self.width, self.questions)
        self.silent = silent
        self.optimum = torch.ones(len(seeds))
        self.group, self.role = two_role_groups(self.dialogues)

    def start(self) -> Tables:
        logits = torch.zeros(len(self.digits), 2 * self.questions + 1, self.width)
        logits[:, : self.questions, 2:] = math.log(self.silent / (1 - self.silent))
        return Tables(logits)

    def play(self, table: Tensor, noise: Noise) -> Batch:
        d = self.dialogues
        question = noise.below(self.questions, d // SAMPLES).repeat_interleave(SAMPLES, dim=1)
        uniform = noise.rand(2 * d)
        plan = choose(table, question, uniform[:, :d])
        heard = torch.where(plan == 0, self.questions + question, 2 * self.questions)
        digit = choose(table, heard, uniform[:, d:])
        speaks = plan < 2
        right = ((digit == self.digits.gather(1, question)) & speaks).float()
        mask = torch.cat([torch.ones_like(speaks), speaks], dim=1)[..., None]
        cells = torch.cat([question, heard], dim=1)[..., None] * mask
        tokens = torch.cat([plan, digit], dim=1)[..., None] * mask
        length = mask[..., 0].float()
        seen = {"silent rows": 1 - speaks.float().mean(dim=1)}
        return Batch(cells, tokens, mask, right.repeat(1, 2), self.group, self.role, length, right.mean(dim=1), seen)


class Networks:
    """One hidden layer over (symbol, role): one network for both roles, or a copy of it for each."""

    def __init__(self, features: Tensor, first: Tensor, second: Tensor, shared: bool):
        self.features, self.half = features, len(features) // 2
        self.sets = [
            [first.clone().requires_grad_(), second.clone().requires_grad_()] for _ in range(1 if shared else 2)
        ]

    def table(self) -> Tensor:
        outputs = [torch.tanh(self.features @ first) @ second for first, second in self.sets]
        logits = outputs[0]
        if len(outputs) == 2:
            logits = torch.cat([outputs[0][:, : self.half], outputs[1][:, self.half :]], dim=1)
        return logits.log_softmax(dim=-1)

    def parameter_sets(self) -> list[list[Tensor]]:
        return self.sets


class Pair:
    """Two roles, one skill or two: each role translates a symbol of its own, and both get the mean of the two.

    States: a symbol of 6 for each role. Actions: a symbol of 6. Reward: (planner right + reasoning right) / 2. The best
    policy gets 1, drawing at random 1/6. ``roles``: "alike": one translation for both; "opposed": reasoning's is the
    planner's shifted by one, so that what is right for one role is wrong for the other.

    Why weights and schedules can differ: one network can carry over what it learns, or be in its own way; a role that
    learns while the other stands still has a baseline that does not move, at half as many updates for the same
    dialogues.
    """

    dialogues, symbols, hidden = 128, 6, 16

    def __init__(self, seeds: Sequence[int], roles: str = "alike", shared: bool = True):
        noise, k = Noise(seeds), self.symbols
        planner = noise.rand(k).argsort(dim=1)
        self.right = torch.stack([planner, planner if roles == "alike" else (planner + 1) % k], dim=1)
        self.shared = shared
        symbol, role = torch.eye(k).repeat(2, 1), torch.eye(2).repeat_interleave(k, dim=0)
        self.features = torch.cat([symbol, role], dim=1)
        self.first = noise.randn(k + 2, self.hidden) / math.sqrt(2)  # two of the features are on
        self.second = noise.randn(self.hidden, k) / math.sqrt(self.hidden)
        self.optimum = torch.ones(len(seeds))
        self.group, self.role = two_role_groups(self.dialogues)

    def start(self) -> Networks:
        return Networks(self.features, self.first, self.second, self.shared)

    def play(self, table: Tensor, noise: Noise) -> Batch:
        d = self.dialogues
        symbols = [noise.below(self.symbols, d // SAMPLES).repeat_interleave(SAMPLES, dim=1) for _ in range(2)]
        cells = torch.cat([symbols[0], self.symbols + symbols[1]], dim=1)
        tokens = choose(table, cells, noise.rand(2 * d))
        truth = torch.cat([self.right[:, role].gather(1, symbols[role]) for role in range(2)], dim=1)
        right = (tokens == truth).float()
        reward = (right[:, :d] + right[:, d:]) / 2
        mask = torch.ones_like(cells, dtype=torch.bool)[..., None]
        return Batch(
            cells[..., None], tokens[..., None], mask, reward.repeat(1, 2), self.group, self.role,
            torch.ones(len(noise), 2 * d), reward.mean(dim=1),
        )  # fmt: skip


class Plans:
    """What a planner does that is paid for agreement: a hint, or the answer?

    States: none. Actions: the planner gives a hint, an answer without a box, or a boxed one (reward -1, the format
    penalty); reasoning works, or copies what it heard (a hint holds nothing to copy: wrong, no answer). A plan is
    answered 8 times, as ``answers_per_plan`` does; reasoning's row is the first. Work is right with 0.8 after a hint
    and 0.6 otherwise; a planner's answer with ``knows``. Wrong answers of work are one of four; copies are all the
    planner's. Reasoning's reward: 1 if right. The planner's: "consistency", the package's function over the 8 answers,
    or "correct", their mean correctness. The best team hints and works: 0.8.

    Why the reward can matter: copies agree perfectly (1.0), honest work after a hint in about 0.8 of the answers.
    """

    dialogues, answers, hinted, unaided = 64, 8, 0.8, 0.6

    def __init__(self, seeds: Sequence[int], reward: str = "correct", knows: float = 0.5):
        self.seeds, self.reward, self.knows = len(seeds), reward, knows
        self.optimum = torch.full((len(seeds),), self.hinted)
        self.group, self.role = two_role_groups(self.dialogues)

    def start(self) -> Tables:
        logits = torch.zeros(self.seeds, 4, 3)
        logits[:, 1:, 2] = -torch.inf  # reasoning has two actions
        return Tables(logits)

    def play(self, table: Tensor, noise: Noise) -> Batch:
        seeds, d = len(noise), self.dialogues
        plan = choose(table, torch.zeros(seeds, d, dtype=torch.long), noise.rand(d))
        heard = (1 + plan)[..., None].expand(seeds, d, self.answers).contiguous()
        does = choose(table, heard, noise.rand(d, self.answers))
        told = torch.where(noise.rand(d) < self.knows, 0, 1 + noise.below(4, d))  # 0 is right
        chance = torch.where(plan == 0, self.hinted, self.unaided)[..., None]
        worked = torch.where(noise.rand(d, self.answers) < chance, 0, 1 + noise.below(4, d, self.answers))
        copied = torch.where(plan == 0, -1, told)[..., None]  # -1: no answer
        answer = torch.where(does == 0, worked, copied)
        right = (answer == 0).float()
        paid = right.mean(dim=2) if self.reward == "correct" else agreement(answer)
        paid = torch.where(plan == 2, -1.0, paid)
        cells = torch.cat([torch.zeros_like(plan), heard[..., 0]], dim=1)[..., None]
        tokens = torch.cat([plan, does[..., 0]], dim=1)[..., None]
        seen = {
            "planner answers": (plan > 0).float().mean(dim=1),
            "reasoning copies": (does == 1).float().mean(dim=(1, 2)),
            "role reversal": ((plan > 0)[..., None] & (does == 1)).float().mean(dim=(1, 2)),
            "agreement": agreement(answer).mean(dim=1),
        }
        return Batch(
            cells, tokens, torch.ones_like(cells, dtype=torch.bool), torch.cat([paid, right[..., 0]], dim=1),
            self.group, self.role, torch.ones(seeds, 2 * d), right.mean(dim=(1, 2)), seen,
        )  # fmt: skip


def agreement(answers: Tensor) -> Tensor:
    """(..., K) answers, -1 for none -> (...), by the reward manager's own ``consistency``."""
    from rema_verl.rewards.rema import consistency

    rows = answers.reshape(-1, answers.shape[-1]).tolist()
    known: dict[tuple[int, ...], float] = {}
    for row in rows:
        key = tuple(row)
        if key not in known:
            known[key] = consistency([None if a < 0 else str(a) for a in row], str.__eq__)
    return torch.tensor([known[tuple(row)] for row in rows]).view(answers.shape[:-1])


class Team:
    """N = 3 agents, each with choices of its own; what the rewards look like is varied, what is good is not.

    States: 8 questions. Actions of each agent: 6, of quality q in [0, 1], drawn per question and agent. An agent's
    reward is (its quality + the team's mean quality) / 2 + Gaussian noise of 0.1, then disturbed:

    clean         as it is
    rescaled      times 10^u, u uniform in [-2, 2] and one per question of a step
    exponential   exp(10 r): increasing, but a lucky draw counts for a hundred
    heavy-tailed  plus 0.3 times a Student t with 1.5 degrees of freedom
    tied          rounded to multiples of 0.5

    The best policy takes every agent's best action: the mean of the best qualities. Why estimators can differ: ranks
    see none of the scales; they see nothing of distances either.

    "partial": qualities are 0.3 for one action of each agent ("solve": reward 1 with probability 0.3), for another
    0.01 for sure ("try"), 0 for four. The reward is the agent's own, without noise. The best policy solves: 0.3. Why
    they can differ: the crumb 0.01 outranks a failed attempt, so 70 of 100 attempts.
    ``crowd``: dialogues of a question.
    """

    agents, questions, actions, budget = 3, 8, 6, 96

    def __init__(self, seeds: Sequence[int], rewards: str = "clean", crowd: int = 8, chance: float = 0.3):
        noise = Noise(seeds)
        self.rewards, self.crowd, self.chance = rewards, crowd, chance
        shape = (self.questions, self.agents, self.actions)
        self.quality = noise.rand(*shape)
        if rewards == "partial":
            order = noise.rand(*shape).argsort(dim=-1)
            self.quality = torch.where(order == 0, chance, torch.where(order == 1, 0.01, 0.0))
        self.optimum = self.quality.amax(dim=-1).mean(dim=(1, 2))
        self.groups = self.budget // crowd
        question, agent = torch.arange(self.groups).repeat_interleave(crowd), torch.arange(self.agents)
        self.group = (question[:, None] * self.agents + agent).flatten()
        self.role = torch.zeros_like(self.group)

    def start(self) -> Tables:
        return Tables(torch.zeros(len(self.quality), self.questions * self.agents, self.actions))

    def play(self, table: Tensor, noise: Noise) -> Batch:
        seeds, rows = len(noise), self.groups * self.crowd
        question = noise.below(self.questions, self.groups)
        asked = question.repeat_interleave(self.crowd, dim=1)
        cells = (asked[..., None] * self.agents + torch.arange(self.agents)).view(seeds, -1)
        tokens = choose(table, cells, noise.rand(rows * self.agents))
        flat = self.quality.view(seeds, -1, self.actions)
        quality = log_probs(flat, cells, tokens).view(seeds, rows, self.agents)  # a look-up
        scale = 10 ** (4 * noise.rand(self.groups) - 2)
        small, luck = noise.randn(rows, self.agents), noise.rand(rows, self.agents)
        reward = (quality + quality.mean(dim=2, keepdim=True)) / 2 + 0.1 * small
        if self.rewards == "rescaled":
            reward = reward * scale.repeat_interleave(self.crowd, dim=1)[..., None]
        elif self.rewards == "exponential":
            reward = (10 * reward).exp()
        elif self.rewards == "heavy-tailed":
            reward = reward + 0.3 * student(noise, rows, self.agents)
        elif self.rewards == "tied":
            reward = (2 * reward).round() / 2
        elif self.rewards == "partial":
            reward = torch.where(quality == 0.01, 0.01, (luck < quality).float())
        seen = {"tries": (quality == 0.01).float().mean(dim=(1, 2))}
        return Batch(
            cells[..., None], tokens[..., None], torch.ones(seeds, rows * self.agents, 1, dtype=torch.bool),
            reward.view(seeds, -1), self.group, self.role, torch.ones(seeds, rows * self.agents),
            quality.mean(dim=(1, 2)), seen, state=cells,
        )  # fmt: skip


def student(noise: Noise, *shape: int) -> Tensor:
    """Student's t with 1.5 degrees of freedom (no variance), by Bailey's polar form of two uniform numbers."""
    u, v = noise.rand(*shape).clamp(min=1e-7), noise.rand(*shape)
    return (1.5 * (u ** (-2 / 1.5) - 1)).sqrt() * torch.cos(2 * torch.pi * v)
