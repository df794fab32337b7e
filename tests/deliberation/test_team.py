"""The deliberation itself, over a fake LLM: who is called when, with what, at what cost; and the baselines."""

import asyncio
import json
import random
from collections import Counter

import pytest

from rema_verl.deliberation import protocol
from rema_verl.deliberation.protocol import ACTIONS
from rema_verl.deliberation.team import (
    PromptTooLong,
    Reply,
    Team,
    always,
    debate,
    deliberate,
    draw,
    place_seed,
    self_consistency,
    single,
    uniform,
)

KIND_OF = {getattr(protocol.Prompts(), kind): kind for kind in protocol.USER}


class FakeLLM:
    """Answers by a script: ``says(kind, user, rng) -> text``. Notes what it was asked, and how much at a time."""

    def __init__(self, says, too_long=lambda kind, user: False):
        self.says, self.too_long = says, too_long
        self.asked: list[tuple[str, str, int, str]] = []  # kind, user message, seed, request id
        self.open = self.most = 0

    async def __call__(self, messages, *, seed, temperature, max_tokens, request_id) -> Reply:
        kind, user = KIND_OF[messages[0]["content"]], messages[1]["content"]
        if self.too_long(kind, user):
            raise PromptTooLong("too long")
        self.asked.append((kind, user, seed, request_id))
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(random.random() / 200)  # replies come back in any order
        self.open -= 1
        text = self.says(kind, user, random.Random(seed))
        return Reply(text, prompt_tokens=len(user), tokens=len(text))

    def kinds(self) -> Counter:
        return Counter(kind for kind, *_ in self.asked)


def solved(answer, steps: int = 2) -> str:
    return f"So \\boxed{{{answer}}}.\nPROFILE: steps={steps}; ops=arithmetic; confidence=80"


def noisy(kind: str, user: str, rng: random.Random) -> str:
    """Random answers and verdicts, all from the call's own seed."""
    return f"VERDICT: {rng.choice(protocol.VERDICTS)}" if kind == "critic" else solved(rng.randrange(4))


def play(llm, policy=uniform, team=None, **options):
    team = team or Team()
    return asyncio.run(deliberate("Q?", policy, llm, team, str.__eq__, key="q", **options))


def by_agent(*actions: str):
    return lambda states, progress, same: [[float(a == action) for a in ACTIONS] for action in actions]


def test_persist_costs_nothing_after_the_first_round():
    llm = FakeLLM(noisy)
    found = play(llm, always("persist"))
    assert llm.kinds() == {"solve": 3, "critic": 3}
    assert all(now.after == now.before for now in found.rounds) and len(found.rounds) == 3
    assert found.tokens == sum(c.prompt_tokens + c.tokens for c in found.calls) > 0


def test_refine_is_a_correction_call_and_a_critic_call_on_what_came_of_it():
    def says(kind, user, rng):
        if kind == "solve":
            return solved(1)
        if kind == "refine":
            assert "Your earlier solution:\n" + solved(1) in user or solved(2) in user
            return solved(2)
        return "VERDICT: " + ("Correct" if solved(2) in user else "Incorrect")

    llm = FakeLLM(says)
    found = play(llm, by_agent("refine", "persist", "persist"), Team(rounds=1))
    assert llm.kinds() == {"solve": 3, "critic": 4, "refine": 1}
    assert [s.answer for s in found.rounds[0].after] == ["2", "1", "1"]
    assert [s.confidence for s in found.rounds[0].after] == [1.0, 0.0, 0.0]
    assert found.answer == "1"
    extra = [c for c in found.calls if c.round == 1]
    assert [(c.kind, c.agent) for c in extra] == [("refine", 0), ("critic", 0)]


def test_concede_adopts_the_most_confident_peers_state_as_it_was_before_the_round():
    verdicts = {"1": "Incorrect", "2": "Unsure", "3": "Correct"}
    # the fake knows an agent by the seed of its call
    places = [random.Random(place_seed(0, "q", 0, "solve", 0, i)).getrandbits(64) for i in range(3)]

    def says(kind, user, rng):
        if kind == "critic":
            return "VERDICT: " + verdicts[user.split("\\boxed{")[1][0]]
        return solved(1 + places.index(rng.getrandbits(64)))

    found = play(FakeLLM(says), always("concede"), Team(rounds=2))
    assert [s.answer for s in found.rounds[0].before] == ["1", "2", "3"]
    # all at once: 3 gives way to 2, while 1 and 2 take over what 3 had
    assert [s.answer for s in found.rounds[0].after] == ["3", "3", "2"]
    assert [s.answer for s in found.rounds[1].after] == ["3", "3", "3"]
    assert found.rounds[0].after[0] == found.rounds[0].before[2]  # the whole state
    assert found.answer == "3"


@pytest.mark.parametrize("agents", [2, 5, 8])
def test_calls_of_a_round_run_together(agents):
    llm = FakeLLM(noisy)
    play(llm, always("refine"), Team(agents=agents, rounds=2))
    assert llm.most == agents
    assert llm.kinds() == {"solve": agents, "critic": 3 * agents, "refine": 2 * agents}


def test_an_agent_keeps_one_request_id_so_that_its_prefix_is_cached():
    llm = FakeLLM(noisy)
    play(llm, always("refine"))
    assert len({request for *_, request in llm.asked}) == 3


def test_the_same_seed_gives_the_same_deliberation_and_another_seed_another():
    first, second = (play(FakeLLM(noisy), team=Team(seed=4)) for _ in range(2))
    assert first == second
    others = [play(FakeLLM(noisy), team=Team(seed=seed)) for seed in range(5, 9)]
    assert any(other.rounds != first.rounds for other in others)
    assert play(FakeLLM(noisy), team=Team(seed=4), sample=1).rounds != first.rounds


def test_seeds_of_all_calls_differ():
    llm = FakeLLM(noisy)
    play(llm, always("refine"), Team(agents=4))
    seeds = [seed for _, _, seed, _ in llm.asked]
    assert len(set(seeds)) == len(seeds)


def test_exploring_executes_every_refine_and_changes_nothing_else():
    llm, plain = FakeLLM(noisy), FakeLLM(noisy)
    explored, played = play(llm, explore=True), play(plain)
    assert llm.kinds()["refine"] == 9
    for a, b in zip(explored.rounds, played.rounds, strict=True):
        assert (a.before, a.actions, a.after) == (b.before, b.actions, b.after)
        assert all(state is not None for state in a.refined)
        for i, action in enumerate(b.actions):
            assert a.outcomes(i)[ACTIONS.index(action)] == b.after[i]
            assert (b.refined[i] is not None) == (action == "refine")
    assert explored.tokens == played.tokens  # the paper's cost: what the team itself needed
    assert {c.kind for c in explored.calls if not c.taken} == {"refine", "critic"}


def test_policies_see_all_states_and_the_progress():
    seen = []

    def policy(states, progress, same):
        seen.append((len(states), progress))
        return uniform(states, progress, same)

    play(FakeLLM(noisy), policy, Team(agents=4, rounds=4))
    assert seen == [(4, 0.0), (4, 0.25), (4, 0.5), (4, 0.75)]


def test_greedy_takes_the_likeliest_action_and_drawing_follows_the_distribution():
    unsure = lambda states, progress, same: [[0.3, 0.3, 0.4]] * len(states)  # noqa: E731
    found = play(FakeLLM(noisy), unsure, greedy=True)
    assert {a for now in found.rounds for a in now.actions} == {"concede"}
    drawn = Counter(draw([0.3, 0.3, 0.4], place_seed(i)) for i in range(3000))
    assert all(abs(drawn[a] / 3000 - p) < 0.03 for a, p in zip(ACTIONS, [0.3, 0.3, 0.4], strict=True))


def test_what_is_malformed_is_counted_and_neutral():
    found = play(FakeLLM(lambda kind, user, rng: "no idea"), always("refine"), Team(rounds=1))
    assert found.counts["malformed_profiles"] == found.counts["malformed_verdicts"] == 6
    assert found.answer is None
    assert all(s.confidence == 0.5 and s.profile.malformed for s in found.rounds[0].after)


def test_a_question_without_room_is_the_callers_and_a_refine_without_room_changes_nothing():
    with pytest.raises(PromptTooLong):
        play(FakeLLM(noisy, too_long=lambda kind, user: kind == "solve"))
    found = play(FakeLLM(noisy, too_long=lambda kind, user: kind == "refine"), always("refine"))
    assert found.counts["overlong"] == 9
    assert all(now.after == now.before for now in found.rounds)
    unrated = play(FakeLLM(noisy, too_long=lambda kind, user: kind == "critic"), always("persist"))
    assert unrated.counts["overlong"] == unrated.counts["malformed_verdicts"] == 3


def test_a_failing_call_ends_the_deliberation():
    def says(kind, user, rng):
        raise RuntimeError("the server is gone")

    with pytest.raises(RuntimeError, match="the server is gone"):
        play(FakeLLM(says))


def test_answers_vote_by_equivalence():
    texts = iter([solved("0.5"), solved("2"), solved("1/2")])
    llm = FakeLLM(lambda kind, user, rng: next(texts) if kind == "solve" else "VERDICT: Unsure")
    same = lambda a, b: eval_fraction(a) == eval_fraction(b)  # noqa: E731
    found = asyncio.run(deliberate("Q?", always("persist"), llm, Team(), same, key="q"))
    assert eval_fraction(found.answer) == 0.5


def eval_fraction(text: str) -> float:
    from fractions import Fraction

    return float(Fraction(text))


# --- baselines -------------------------------------------------------------------------------------------------------


def test_single_agents_make_one_call():
    for kind in ("vanilla", "cot"):
        llm = FakeLLM(noisy)
        found = asyncio.run(single(kind, "Q?", llm, Team(), key="q"))
        assert llm.kinds() == {kind: 1} and found.answer in "0123"


def test_self_consistency_votes_over_so_many_chains():
    answers = iter("12212")
    llm = FakeLLM(lambda kind, user, rng: f"\\boxed{{{next(answers)}}}")
    found = asyncio.run(self_consistency("Q?", 5, llm, Team(), str.__eq__, key="q"))
    assert llm.kinds() == {"cot": 5} and llm.most == 5 and found.answer == "2"


def test_debaters_read_each_other_in_every_round():
    llm = FakeLLM(noisy)
    found = asyncio.run(debate("Q?", llm, Team(agents=3, rounds=2), str.__eq__, key="q"))
    assert llm.kinds() == {"solve": 3, "debate": 6} and llm.most == 3
    users = [user for kind, user, *_ in llm.asked if kind == "debate"]
    assert all("Agent 1:\n" in user and "Agent 2:\n" in user and "Agent 3" not in user for user in users)
    assert {c.round for c in found.calls} == {0, 1, 2}


def test_debate_starts_from_the_same_solutions_as_the_team():
    team, votes = FakeLLM(noisy), FakeLLM(noisy)
    play(team)
    asyncio.run(debate("Q?", votes, Team(), str.__eq__, key="q"))
    assert {a[2] for a in team.asked if a[0] == "solve"} == {a[2] for a in votes.asked if a[0] == "solve"}


# --- collect and evaluate over the fake ------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    import argparse

    from rema_verl.deliberation.collect import Job, Question

    args = argparse.Namespace(
        out=tmp_path / "out", samples=2, in_flight=4, grading_timeout=5.0, model="fake", policy=[("learned", "x")],
        greedy=True, baselines=["majority", "vanilla", "cot", "self_consistency", "debate"],
    )  # fmt: skip
    questions = [Question(f"q{i}", f"Question {i}?", str(i % 4), "synthetic") for i in range(40)]
    settings = {"agents": 3, "rounds": 2, "temperature": 1.0, "seed": 3, "samples": 2}
    return Job(args, Team(rounds=2, seed=3), questions, None, None, settings)


class FakeClient(FakeLLM):
    def forget(self) -> None:
        pass


def test_a_collection_that_was_stopped_goes_on_to_the_same_corpus(job, tmp_path):
    from rema_verl.deliberation import collect, corpus

    class Stop(Exception):
        pass

    def stops(kind, user, rng):
        if len(llm.asked) > 400:
            raise Stop
        return noisy(kind, user, rng)

    llm = FakeClient(stops)
    with pytest.raises(Stop):
        asyncio.run(collect.collect(job, uniform, llm))
    some = corpus.done_keys(job.args.out)
    assert 0 < len(some) < 80
    asked = len(llm.asked)
    llm.says = noisy
    llm.asked.clear()
    assert asyncio.run(collect.collect(job, uniform, llm)) == 0
    assert len(llm.asked) == (80 - len(some)) * (6 + 2 * 3 * 2) and asked > 0
    resumed = corpus.read(job.args.out)

    job.args.out = tmp_path / "again"
    job.args.in_flight = 13
    asyncio.run(collect.collect(job, uniform, FakeClient(noisy)))
    whole = corpus.read(job.args.out)
    assert whole.equals(resumed) and whole.num_rows == 80 * 2 * 3
    assert corpus.content_hash(whole) == corpus.content_hash(resumed)
    assert "480 states of 80 trajectories" in collect.summary(job.args.out, 0)


def test_rewards_of_a_corpus_are_what_replaying_with_that_action_earns(job):
    from rema_verl.deliberation import collect

    question = job.questions[5]
    grader = job.grader(question)
    found = asyncio.run(
        deliberate(question.text, uniform, FakeLLM(noisy), job.team, grader.same, key=question.id, explore=True)
    )
    rows = collect.visited(found, question, grader, "name", 3)
    for row in rows:
        now = found.rounds[row["round"]]
        for action, reward in enumerate(row["rewards"]):
            after = list(now.after)
            after[row["agent"]] = now.outcomes(row["agent"])[action]
            right = [s.answer == question.truth for s in after]
            expected = protocol.rewards(
                [s.answer == question.truth for s in now.before],
                [s.answer for s in after],
                right,
                [s.confidence for s in after],
                str.__eq__,
            )[row["agent"]]
            assert reward == expected
        assert row["tokens"][0] == row["tokens"][2] == 0 < row["tokens"][1]
    assert {abs(r) for row in rows for r in row["rewards"]} - {0.0}  # the task pays something


def test_an_overlong_question_is_skipped_and_counted(job):
    from rema_verl.deliberation import collect, corpus

    llm = FakeClient(noisy, too_long=lambda kind, user: user == "Question 7?")
    assert asyncio.run(collect.collect(job, uniform, llm)) == 2
    assert len(corpus.done_keys(job.args.out)) == 78
    assert "skipped" in collect.summary(job.args.out, 2)


def test_evaluation_pairs_methods_and_counts_what_each_costs(job):
    from rema_verl.deliberation import evaluate

    def says(kind, user, rng):
        if kind == "critic":
            return "VERDICT: Unsure"
        right = int(user.split("Question ")[1].split("?")[0]) % 4
        odds = {"solve": 0.5, "cot": 0.5, "refine": 1.0, "debate": 0.7, "vanilla": 0.0}[kind]
        return solved(right if rng.random() < odds else right + 1)

    policies = {"refine": always("refine"), "persist": always("persist")}
    methods = asyncio.run(evaluate.evaluate(job, policies, FakeClient(says)))
    assert list(methods) == [
        "refine", "persist", "refine, greedy", "persist, greedy", *evaluate.BASELINES
    ]  # fmt: skip
    assert methods["refine"].accuracies().mean() == 1 and methods["vanilla"].accuracies().mean() == 0
    assert methods["persist"].correct == methods["majority"].correct
    results = {name: m.result(seed=0) for name, m in methods.items()}
    assert results["refine"]["actions"] == [{"persist": 0, "refine": 1, "concede": 0}] * 2
    assert results["refine"]["calls"] == 6 + 12 and results["debate"]["calls"] == 9
    assert results["self_consistency"]["calls"] == job.settings["self_consistency_calls"] == 6  # the last policy's
    assert results["refine"]["by_kind"].keys() == {"solve", "critic", "refine"}
    assert results["refine"]["total_tokens"] == pytest.approx(
        sum(r["prompt_tokens"] + r["tokens"] for r in results["refine"]["by_agent"].values())
    )
    assert results["debate"]["low"] <= results["debate"]["accuracy"] <= results["debate"]["high"]
    seconds = {"policy_seconds_per_1000_states": 0.002, "llm_call_seconds": 0.05}
    text = evaluate.report(job, policies, methods, seconds)
    assert "2.00 ms for 1,000 states, one LLM call 50.0 ms" in text
    written = json.loads((job.args.out / "results.json").read_text())
    assert written["compared"] == "persist"
    assert written["differences"]["refine"]["high"] < 0 and written["methods"]["refine"]["correct"]["q0"] == [1, 1]
    assert (job.args.out / "results.md").read_text() == text


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path, tokenizers):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from build_tiny import build_model

    rows = [
        {
            "data_source": "s",
            "prompt": [{"role": "user", "content": f"{i}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(i)},
        }
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    pq.write_table(pa.table({"prompt": [1]}), tmp_path / "other.parquet")
    build_model(tokenizers["llama3"], tmp_path / "model", seed=0, hidden=64, layers=1)
    (tmp_path / "prompts.json").write_text('{"sovle": "x"}')
    (tmp_path / "policy.safetensors").write_bytes(b"no")
    return tmp_path


MISTAKES = {
    "one agent": (["--agents", "1"], "mpdf.agents must be at least 2, got 1"),
    "no round": (["--rounds", "0"], "mpdf.rounds must be at least 1, got 0"),
    "no such model": (["--model", "nowhere/model"], "--model nowhere/model: cannot load it"),
    "no such questions": (["--questions", "nowhere.parquet"], "--questions nowhere.parquet: no such file"),
    "wrong columns": (["--questions", "{}/other.parquet"], "other.parquet: no column 'reward_model'"),
    "no such policy": (["--policy", "a=nowhere.safetensors"], "nowhere.safetensors: no such file"),
    "no policy": (["--policy", "a={}/policy.safetensors"], "policy.safetensors: not a readable safetensors file"),
    "unknown prompt": (["--prompts", "{}/prompts.json"], "mpdf.prompts.sovle is not an option"),
    "no room": (["--max-tokens", "64", "--context", "64"], "leaves no room for a prompt"),
    "verl's option": (["--", "actor_rollout_ref.rollout.sped=1"], "sped"),
    "unknown option": (["--agnets", "3"], "unrecognized arguments: --agnets 3 (see --help)"),
}


@pytest.mark.parametrize("command", ["collect", "evaluate"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(command, mistake, inputs, capsys, monkeypatch):
    import importlib

    module = importlib.import_module(f"rema_verl.deliberation.{command}")
    monkeypatch.setattr(module, "serve", lambda *_: pytest.fail("a model was loaded"))
    extra, message = MISTAKES[mistake]
    extra = [part.replace("{}", str(inputs)) for part in extra]
    if command == "collect":
        extra = [part.removeprefix("a=") for part in extra]
    given = ["--model", str(inputs / "model"), "--questions", str(inputs / "q.parquet"), "--device", "cpu"]
    given += ["--out", str(inputs / "out"), *(["--policy", "uniform"] if command == "evaluate" else [])]
    with pytest.raises(SystemExit) as stop:
        module.main([*given, *extra])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("rema-verl: error: ") and said.count("\n") == 1 and message in said
    assert not (inputs / "out").exists()


def test_a_folder_that_was_begun_with_other_settings_is_refused(inputs):
    from rema_verl.deliberation.collect import prepare_collect

    def command(*extra):
        return ["--model", str(inputs / "model"), "--questions", str(inputs / "q.parquet"), "--device", "cpu",
                "--out", str(inputs / "out"), *extra]  # fmt: skip

    prepare_collect(command())
    prepare_collect(command("--in-flight", "2"))  # how fast may change
    for extra, key in ((["--seed", "1"], "seed"), (["--rounds", "2"], "rounds"), (["--policy", "persist"], "policy")):
        with pytest.raises(ValueError, match=f"begun with another {key}; use another --out"):
            prepare_collect(command(*extra))
