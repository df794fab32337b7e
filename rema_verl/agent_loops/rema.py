"""Agent loop ``rema``: one two-role dialogue, tokens in and tokens out, two training rows.

Each role has a :class:`Stream`: the exact ids it was given and sampled. Sampled ids are appended as they came, never
re-encoded; a partner's message is encoded once, when it enters the other role's stream. Streams only grow, and each
role keeps one request id, so that verl routes it to the replica whose prefix cache holds its earlier turns.

    row of a role:  prompts = system, question (, first instruction)
                    responses = own turn 1 | separators, partner's message | own turn 2 | ...
                    response_mask =  1 1 1 | 0 0 0 ...                     |  1 1 1     | ...
"""

import asyncio
import copy
import functools
import hashlib
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from rema_verl.agent_loops.prefill import common_prefix
from rema_verl.config import ReMAConfig, role_config
from rema_verl.dialogue import (
    JSON_SCHEMA,
    META_THINKING,
    REASONING,
    ROLES,
    Dialogue,
    Prompts,
    StopReason,
    default_prompts,
    neutralise,
    parse_plan,
)

_MARKER = re.compile(r"<[^<>\s]{1,80}>|\[/?[A-Z][A-Z_]*\]|<<[^<>]{1,40}>>")


def prompts_for(config: ReMAConfig) -> Prompts:
    """The prompts of the setting, with the configured overrides."""
    default = default_prompts(config.max_turns, config.task, config.plan)
    return replace(default, **{k: v for k, v in config.prompts.items() if v is not None})


def question_name(seed: int | None, kwargs: dict[str, Any]) -> str:
    """What names a question to :func:`call_seed`: its place in the run, which trainer mode ``rema`` made its uid.

    In validation verl draws uids at random. There the question itself is its name, with its index in the data if the
    row has one, so that a validation under ``rema.seed`` repeats itself too. (Rows that are the same in both are then
    sampled alike.)

    >>> question_name(0, {"uid": "0-000001-000007", "raw_prompt": []})
    '0-000001-000007'
    >>> row = {"raw_prompt": [{"role": "user", "content": "1+1?"}], "extra_info": {"index": 3}}
    >>> question_name(0, row | {"uid": "c0ffee"}) == question_name(0, row | {"uid": "decaf"})
    True
    """
    uid = str(kwargs.get("uid"))
    if seed is None or uid.startswith(f"{seed}-"):
        return uid
    about = [list(kwargs["raw_prompt"]), (kwargs.get("extra_info") or {}).get("index")]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()


def call_seed(seed: int | None, *place: object) -> dict[str, int]:
    """The sampling seed of the call at this place of a run; nothing where ``rema.seed`` is not set.

    >>> call_seed(0, "0-1-7", 3, "reasoning", 1, 0)
    {'seed': 1315012700}
    >>> call_seed(None, "0-1-7", 3, "reasoning", 1, 0)
    {}
    """
    if seed is None:
        return {}
    digest = hashlib.sha256(json.dumps([seed, *place]).encode()).digest()
    return {"seed": int.from_bytes(digest[:4], "big") >> 1}


@functools.lru_cache(maxsize=8)
def _own_tokenizer(model_config: str):
    """(tokenizer, model type) of a role's own model; loops are made per trajectory, so this is kept."""
    model = omega_conf_to_dataclass(OmegaConf.create(model_config))
    if model.custom_chat_template is not None:
        model.tokenizer.chat_template = model.custom_chat_template
    return model.tokenizer, getattr(model.hf_config, "model_type", None)


@functools.lru_cache(maxsize=8)
def _control_strings(tokenizer, chat_template_kwargs: str) -> tuple[str, ...]:
    return control_strings(tokenizer, json.loads(chat_template_kwargs))


def control_strings(tokenizer, chat_template_kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Every string with which a message could pretend to end itself or to begin another one.

    These are the tokenizer's added tokens, and whatever looks like a marker in the text that the chat template puts
    around messages (some templates use markers that are ordinary text to the tokenizer).
    """
    x = "\N{MIDDLE DOT}"
    chat = [{"role": "system", "content": x}, {"role": "user", "content": x}, {"role": "assistant", "content": x}]
    frame = tokenizer.apply_chat_template(
        chat + chat[1:2], tokenize=False, add_generation_prompt=True, **chat_template_kwargs
    )
    found = {str(token) for token in tokenizer.get_added_vocab()} | set(_MARKER.findall(frame))
    return tuple(sorted((c for c in found if len(c) > 1 and not c.isspace()), key=len, reverse=True))


@dataclass
class Stream:
    """One role's tokens: ``ids`` = prompt + response, with mask and log-probs over the response."""

    ids: list[int]
    num_prompt: int
    mask: list[int] = field(default_factory=list)  # 1 = sampled by this role
    logprobs: list[float] | None = field(default_factory=list)  # 0.0 where the mask is 0
    spans: list[tuple[int, int]] = field(default_factory=list)  # [start, end) of each own turn, in the response


@register("rema")
class ReMAAgentLoop(AgentLoopBase):
    """Runs one dialogue and returns two rows, ``meta_thinking`` first.

    A question whose opening prompt exceeds ``rollout.prompt_length`` is skipped (no rows), never cut: the trainer
    counts it as ``rollout/skipped_trajectories``.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rema = ReMAConfig.of(self.config)
        # read once: a look-up in an OmegaConf node costs as much as a short decode
        self.context_tokens = self.rollout_config.prompt_length
        self.turn_tokens = self.rollout_config.response_length
        self.seats = {role: self._seat(role) for role in ROLES}
        template = json.dumps(OmegaConf.to_container(OmegaConf.create(self.apply_chat_template_kwargs)), sort_keys=True)
        found = {c for seat in self.seats.values() for c in _control_strings(seat.tokenizer, template)}
        controls = sorted(found - {self.rema.finish_flag}, key=lambda control: (-len(control), control))
        for seat in self.seats.values():
            seat.control_strings = tuple(controls)  # of both: what one role writes, the other reads
            seat.end_ids = set(seat.tokenizer.all_special_ids)

    def _seat(self, role: str) -> "ReMAAgentLoop":
        """This loop with the tokenizer, chat template and token builder of the role's own model, if it has one."""
        options = self.rema.roles[role]
        if options.model_path is None and not options.overrides.get("model"):
            return self
        seat = copy.copy(self)
        seat.tokenizer, model_type = _own_tokenizer(
            OmegaConf.to_yaml(role_config(self.config, role).actor_rollout_ref.model)
        )
        seat.continuous_token_builder = create_continuous_token_builder(
            seat.tokenizer,
            hf_model_type=model_type,
            chat_template_kwargs=self.apply_chat_template_kwargs,
            mm_processor_kwargs=self.mm_processor_kwargs,
            processor=None,
        )
        return seat

    async def run(self, sampling_params: dict[str, Any], **kwargs) -> list[AgentLoopOutput]:
        """Play the dialogue for ``kwargs["raw_prompt"]`` (its last user message is the question).

        Returns:
            Two outputs, in the order of ``ROLES``; an empty list when the question does not fit.
        """
        if self.rema.plan == "json":
            from vllm.sampling_params import StructuredOutputsParams
        plan_question = (kwargs.get("extra_info") or {}).get("meta_thinking_question")
        dialogue = Dialogue(
            neutralise(question_of(kwargs["raw_prompt"]), self.seats[META_THINKING].control_strings),
            max_turns=self.rema.max_turns,
            finish_flag=self.rema.finish_flag,
            prompts=prompts_for(self.rema),
            plan_question=plan_question and neutralise(plan_question, self.seats[META_THINKING].control_strings),
            plan=self.rema.plan,
        )
        trajectory_id = uuid4().hex
        streams: dict[str, Stream] = {}
        began, waited = time.time(), 0.0  # waited: for the engine, in seconds
        engine_spans: list[tuple[int, float, float]] = []  # (replica, begin, end) of each call, by its server's clock
        counts: Counter[str] = Counter()
        versions: dict[str, list[int]] = {role: [] for role in ROLES}  # of the weights that generated
        other_answers: list[str] = []  # to the same plan; they reward it, and are not trained

        while (role := dialogue.speaker) is not None:
            before, seat = streams.get(role), self.seats[role]
            stream = seat._listen(before, dialogue.view(role))
            counts["drift"] += lost(before.ids, stream.ids) if before else 0
            if len(stream.ids) > self.context_tokens:
                if not dialogue.messages:
                    return skipped(self.config)
                dialogue.stop(StopReason.CONTEXT_EXHAUSTED)
                break  # the role's row stays as it was before the message it cannot answer
            sampling = dict(sampling_params)
            if sampling.get("temperature") != 0:  # a greedy validation stays greedy
                sampling |= self.rema.roles[role].sampling()
            if role == META_THINKING and self.rema.plan == "json":
                sampling["structured_outputs"] = StructuredOutputsParams(json=JSON_SCHEMA)
            samples = self.rema.answers_per_plan if role == REASONING else 1
            place = (question_name(self.rema.seed, kwargs), kwargs.get("session_id"), role, dialogue.num_turns)
            asked = time.perf_counter()  # verl's simple_timer keeps every time it ever took
            outputs = await asyncio.gather(
                *(
                    self.server_manager.generate(
                        request_id=f"{trajectory_id}-{role}",
                        prompt_ids=stream.ids,
                        sampling_params={
                            **sampling,
                            **call_seed(self.rema.seed, *place, i),
                            "max_tokens": self.turn_tokens,
                        },
                        priority=int(kwargs.get("priority", 0)),
                    )
                    for i in range(samples)
                )
            )
            waited += time.perf_counter() - asked
            for output in outputs:
                if output.stop_reason == "aborted":
                    raise RuntimeError(f"generation of {role} was aborted by the server in trajectory {trajectory_id}")
                counts["prompt_tokens"] += len(stream.ids)
                counts["cached_tokens"] += output.extra_fields.get("num_cached_tokens") or 0
                counts["preempted"] += output.num_preempted or 0
                seen = (output.extra_fields[key] for key in ("min_global_steps", "max_global_steps"))
                versions[role] += [version for version in seen if version is not None]
                if span := output.extra_fields.get("engine_span"):
                    engine_spans.append((span["replica"], span["began"], span["ended"]))
            output, *others = outputs
            if not output.token_ids:
                dialogue.stop(StopReason.NO_TOKEN)
                break  # a turn without a token has no place in a row: nothing could carry its reward or its ratio
            streams[role] = seat._speak(stream, output)
            counts["drift"] += lost([*stream.ids, *output.token_ids], streams[role].ids)
            message, truncated = seat._message(list(output.token_ids))
            dialogue.add(message, truncated=truncated)
            other_answers += [seat._message(list(other.token_ids))[0] for other in others]

        ended = time.time()
        for role in ROLES:
            if role not in streams:  # it never came to speak: a fully masked row keeps two rows per trajectory
                streams[role] = self.seats[role]._silence(dialogue.view(role))

        shared = {
            "trajectory_id": trajectory_id,
            "stop_reason": str(dialogue.stop_reason),
            "dialogue_turns": dialogue.num_turns,
            "prompt_tokens": counts["prompt_tokens"],
            "cached_tokens": counts["cached_tokens"],
            "token_drift": counts["drift"],
            "messages": list(dialogue.messages),
            "other_answers": other_answers,
            "pending": (began, ended),
            "engine_spans": engine_spans,
        }
        anyone = [version for role in ROLES for version in versions[role]]
        own = {role: versions[role] or anyone for role in ROLES}
        if self.rema.plan == "json" and dialogue.messages:
            shared["plan_action"] = parse_plan(dialogue.messages[0])[0]
        return [
            AgentLoopOutput(
                prompt_ids=stream.ids[: stream.num_prompt],
                response_ids=stream.ids[stream.num_prompt :],
                response_mask=stream.mask,
                response_logprobs=stream.logprobs,
                num_turns=len(stream.spans),
                metrics=AgentLoopMetrics(generate_sequences=waited, num_preempted=counts["preempted"]),
                extra_fields={
                    **shared,
                    "role": role,
                    "turn_spans": stream.spans,
                    "min_global_steps": min(own[role], default=None),
                    "max_global_steps": max(own[role], default=None),
                },
            )
            for role, stream in ((role, streams[role]) for role in ROLES)
        ]

    # verl's ct_merge_* do this in threads; the hand-over alone was a third of our time per turn

    def _listen(self, stream: Stream | None, view: list[dict[str, str]]) -> Stream:
        """The role's stream with what the partner said last, ready to be continued."""
        builder = self.continuous_token_builder
        if stream is None:
            ids = builder.build_initial_tokens(view)
            return Stream(ids=ids, num_prompt=len(ids))
        merged = builder.merge_context_tokens(view[:-1], view, stream.ids)
        mask, logprobs = builder.align_response_metadata(merged, stream.mask, stream.logprobs)
        return replace(stream, ids=merged.token_ids, mask=mask, logprobs=logprobs)

    def _speak(self, stream: Stream, output) -> Stream:
        """The speaker's stream with the sampled ids appended, as they came."""
        builder, sampled = self.continuous_token_builder, output.log_probs or None
        logprobs = stream.logprobs if sampled else None  # None: rollout.calculate_log_probs is off
        merged = builder.merge_assistant_tokens(stream.ids, list(output.token_ids))
        mask, logprobs = builder.align_response_metadata(merged, stream.mask, logprobs, assistant_logprobs=sampled)
        span = (len(stream.mask), len(mask))
        return replace(stream, ids=merged.token_ids, mask=mask, logprobs=logprobs, spans=[*stream.spans, span])

    def _silence(self, view: list[dict[str, str]]) -> Stream:
        """The row of a role that never spoke: its opening prompt and one masked token."""
        stream = self._listen(None, view)
        ids = stream.ids[: self.context_tokens]
        return Stream(ids=[*ids, self.tokenizer.eos_token_id], num_prompt=len(ids), mask=[0], logprobs=[0.0])

    def _message(self, ids: list[int]) -> tuple[str, bool]:
        """The text the partner will read, and whether it was cut off at the per-turn limit."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)  # takes less time than a thread's hand-over
        truncated = len(ids) >= self.turn_tokens and ids[-1] not in self.end_ids
        return neutralise(text, self.control_strings), truncated


def skipped(config) -> list[AgentLoopOutput]:
    """What a loop returns for a question that does not fit: no rows.

    verl's group filter takes a finished group without rows for a fault and ends the run. Where it is on, the question
    has failed instead.

    Raises:
        ValueError: ``algorithm.filter_groups`` is on.
    """
    if OmegaConf.select(config, "algorithm.filter_groups.enable"):
        raise ValueError("the question is longer than data.max_prompt_length")
    return []


def lost(sent: list[int], kept: list[int]) -> int:
    """How many of the ids that the engine saw are not what ``kept`` begins with.

    >>> lost([1, 2, 3], [1, 2, 3, 4]), lost([1, 2, 3], [1, 5, 3, 4])
    (0, 2)
    """
    return 0 if kept[: len(sent)] == sent else len(sent) - common_prefix(sent, kept)


def question_of(raw_prompt) -> str:
    """The question: the content of the last user message of a dataset row.

    Raises:
        ValueError: if there is none.
    """
    for message in reversed(list(raw_prompt)):
        if message["role"] == "user" and str(message["content"]).strip():
            return str(message["content"])
    raise ValueError("the prompt has no user message")
