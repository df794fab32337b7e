"""A third role, and another rule for the end.

`critic` reads every answer of reasoning, meta_thinking hears both, and critic's [ACCEPT] ends the dialogue.
"""

from dataclasses import dataclass, field
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput, register

from rema_verl.agent_loops.rema import ReMAAgentLoop, Stream, prompts_for, question_of
from rema_verl.dialogue import META_THINKING, Dialogue, StopReason, neutralise

CRITIC, ACCEPT = "critic", "[ACCEPT]"
PROMPT = (
    f"You check one step of a solution at a time. Name the first mistake, or write {ACCEPT} when the problem is solved."
)


@dataclass
class CriticDialogue(Dialogue):
    """`messages` has what meta_thinking and reasoning said, as before; `remarks` has critic's, one per answer."""

    remarks: list[str] = field(default_factory=list)

    @property
    def speaker(self):
        answers = len(self.messages) // 2
        if self.stop_reason is None and answers > len(self.remarks):
            return CRITIC
        return super().speaker

    def add(self, message, truncated=False):
        if self.speaker != CRITIC:
            super().add(message, truncated)
            return
        self.remarks.append(message)
        if truncated:
            self.stop_reason = StopReason.TRUNCATED
        elif not message.strip():
            self.stop_reason = StopReason.EMPTY_MESSAGE
        elif ACCEPT in message:
            self.stop_reason = StopReason.FINISHED

    def view(self, role):
        if role == CRITIC:
            view = [{"role": "system", "content": PROMPT}]
            for i, answer in enumerate(self.messages[1::2]):
                view.append({"role": "user", "content": answer if i else f"{self.question}\n\n{answer}"})
                view += [{"role": "assistant", "content": remark} for remark in self.remarks[i : i + 1]]
            return view
        view = super().view(role)
        if role == META_THINKING:  # system, question, own message, answer, own message, answer, ...
            for i, remark in enumerate(self.remarks):
                heard = view[3 + 2 * i : 4 + 2 * i]
                for message in heard:
                    message["content"] += f"\n\nCritic: {remark}"
        return view


@register("critic")
class CriticAgentLoop(ReMAAgentLoop):
    """One row for each role that spoke. Ids are appended as they were sampled: see `Stream`."""

    async def run(self, sampling_params, **kwargs):
        dialogue = CriticDialogue(
            neutralise(question_of(kwargs["raw_prompt"]), self.control_strings),
            max_turns=self.rema.max_turns,
            finish_flag=self.rema.finish_flag,
            prompts=prompts_for(self.rema),
        )
        trajectory_id = uuid4().hex
        streams: dict[str, Stream] = {}
        versions = []  # of the weights that generated
        while (role := dialogue.speaker) is not None:
            stream = self._listen(streams.get(role), dialogue.view(role))
            if len(stream.ids) > self.context_tokens:
                if not streams:
                    return []  # the question does not fit
                dialogue.stop(StopReason.CONTEXT_EXHAUSTED)
                break
            output = await self.server_manager.generate(
                request_id=f"{trajectory_id}-{role}",
                prompt_ids=stream.ids,
                sampling_params={**sampling_params, "max_tokens": self.turn_tokens},
            )
            versions += [output.extra_fields[f"{which}_global_steps"] for which in ("min", "max")]
            streams[role] = self._speak(stream, output)
            message, truncated = self._message(list(output.token_ids))
            dialogue.add(message, truncated)
        return [
            AgentLoopOutput(
                prompt_ids=stream.ids[: stream.num_prompt],
                response_ids=stream.ids[stream.num_prompt :],
                response_mask=stream.mask,
                response_logprobs=stream.logprobs,
                num_turns=len(stream.spans),
                metrics=AgentLoopMetrics(),
                extra_fields={
                    "role": role,
                    "turn_spans": stream.spans,
                    "trajectory_id": trajectory_id,
                    "stop_reason": str(dialogue.stop_reason),
                    "dialogue_turns": dialogue.num_turns,
                    "messages": list(dialogue.messages),
                    "remarks": list(dialogue.remarks),
                    "min_global_steps": min(versions),
                    "max_global_steps": max(versions),
                },
            )
            for role, stream in streams.items()
        ]
