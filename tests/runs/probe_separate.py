"""Loaded into every process of a run by VERL_USE_EXTERNAL_MODULES: after each step, each role's engine gets the same
prompt at temperature 0, and what it says is appended to the file $PROBE."""

import asyncio
import json
import os
from uuid import uuid4

import wrapt

PROMPT = list(range(5, 45))


@wrapt.when_imported("rema_verl.trainers.separate")
def ask_after_each_step(module) -> None:
    def on_step_end(self, original=module.SeparateTrainer.on_step_end):
        original(self)
        for role, player in self.players.items():
            call = player.servers.get_client().generate(
                request_id=uuid4().hex,
                prompt_ids=PROMPT,
                sampling_params={"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "logprobs": True},
            )
            said = asyncio.run(call)
            with open(os.environ["PROBE"], "a") as file:
                line = {"step": self.global_steps, "role": role, "ids": said.token_ids, "log_probs": said.log_probs}
                file.write(json.dumps(line) + "\n")

    module.SeparateTrainer.on_step_end = on_step_end
