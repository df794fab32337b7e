"""Loaded into every process of a run by VERL_USE_EXTERNAL_MODULES. It writes down, as JSON lines in the folder $PROBE:

- ``requests``: each request that an engine got and how it was answered, also those that a weight sync cut short;
- ``rows``: each row that was trained, with the log-probabilities of engine and trainer.
"""

import json
import os
from pathlib import Path

import wrapt


def write(name: str, **line) -> None:
    with (Path(os.environ["PROBE"]) / f"{name}-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


@wrapt.when_imported("verl.workers.rollout.llm_server")
def note_requests(module) -> None:
    original = module.LLMServerClient.generate  # one request; the client for partial rollouts makes several of them

    async def generate(self, request_id, *, prompt_ids, **kwargs):
        output = await original(self, request_id, prompt_ids=prompt_ids, **kwargs)
        write(
            "requests",
            request_id=request_id,
            prompt=list(prompt_ids),
            ids=list(output.token_ids),
            log_probs=list(output.log_probs or []),
            stop_reason=output.stop_reason,
            version=output.extra_fields["global_steps"],
        )
        return output

    module.LLMServerClient.generate = generate


@wrapt.when_imported("verl.trainer.ppo.v1.trainer_base")
def note_rows(module) -> None:
    original = module.PPOTrainer._compute_metrics
    of_tokens = ["prompts", "responses", "response_mask", "rollout_log_probs", "old_log_probs", "advantages"]

    def _compute_metrics(self, batch, *args, global_steps, **kwargs):
        keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding")]
        fields = module.tq.kv_batch_get(
            keys=keys, partition_id=batch.partition_id, select_fields=[*of_tokens, "extra_fields"]
        )
        columns = {name: [tensor.tolist() for tensor in fields[name].unbind()] for name in of_tokens}
        extra = [getattr(value, "data", value) for value in list(fields["extra_fields"])]
        known = ("role", "trajectory_id", "turn_spans", "token_drift", "min_global_steps", "max_global_steps")
        for i, key in enumerate(keys):
            of_row = {name: column[i] for name, column in columns.items()}
            write("rows", key=key, step=global_steps, **of_row, **{name: extra[i][name] for name in known})
        return original(self, batch, *args, global_steps=global_steps, **kwargs)

    module.PPOTrainer._compute_metrics = _compute_metrics
