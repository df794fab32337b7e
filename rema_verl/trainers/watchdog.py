"""Ends a run whose workers or engines have died.

verl 0.9.1 can wait for ever then: a weight sync waits for a vLLM engine that is gone, the replay buffer waits for
trajectories that nobody will deliver. A thread in the trainer's process asks every actor, every few seconds, for a
sign of life; the first one found dead ends the process with one line and exit code 1. Checkpoints are left alone.
"""

import os
import sys
import threading
import time

import ray

GRACE = 2.0  # seconds for Ray to forward the line to the driver's terminal


def _engine_dead(server) -> bool:
    """Runs inside a vLLM server actor: has its engine core process gone?"""
    return bool(getattr(getattr(server, "engine", None), "errored", False))


class Watchdog(threading.Thread):
    """Watches named actors; see the module docstring.

    Args:
        actors: display name -> Ray actor handle.
        engines: display name -> handle of a vLLM server actor, whose engine is asked for too.
        interval: seconds between two rounds.
        hint: returns what the user can do next, for the error line.
    """

    def __init__(self, actors: dict, engines: dict, interval: float, hint):
        super().__init__(name="rema-verl-watchdog", daemon=True)
        self.actors, self.engines, self.interval, self.hint = actors, engines, interval, hint
        self.done = threading.Event()
        self.pending: dict = {}  # name -> the question a busy actor has not answered yet

    @classmethod
    def over(cls, trainer, agent_loop_manager, interval: float) -> "Watchdog":
        """A watchdog over everything that a synchronous verl trainer started."""
        actors = {f"trainer worker {i}": w for i, w in enumerate(trainer.actor_rollout_wg.workers)}
        actors |= {f"agent loop worker {i}": w for i, w in enumerate(agent_loop_manager.agent_loop_workers)}
        actors |= {f"reward worker {i}": w for i, w in enumerate(trainer.get_reward_handles() or [])}
        engines = {
            f"vLLM server {i}.{j}": server
            for i, replica in enumerate(trainer.llm_server_manager.get_replicas())
            for j, server in enumerate(replica.servers)
        }
        actors["TransferQueue controller"] = ray.get_actor("TransferQueueController", namespace="transfer_queue")
        return cls(actors, engines, interval, trainer.resume_hint)

    def __enter__(self) -> "Watchdog":
        if self.interval > 0:
            self.start()
        return self

    def __exit__(self, *exc) -> None:
        # After an error the clean-up (TransferQueue's, Ray's) may itself wait for the dead: keep watching.
        if exc[0] is None:
            self.done.set()

    def run(self) -> None:
        while not self.done.wait(self.interval):
            if dead := self.find_dead():
                print(f"rema-verl: error: {dead} died; {self.hint()}", file=sys.stderr, flush=True)
                time.sleep(GRACE)
                os._exit(1)

    def find_dead(self) -> str | None:
        """Name and cause of the first dead actor or engine, None if all may still be alive.

        A busy actor answers late; its question stays open and is looked at again in the next round. A dead one's
        question fails at once.
        """
        for name, actor in {**self.actors, **self.engines}.items():
            if name not in self.pending:
                ask = _engine_dead if name in self.engines else _alive
                self.pending[name] = actor.__ray_call__.remote(ask)
        ready, _ = ray.wait(list(self.pending.values()), num_returns=len(self.pending), timeout=1.0)
        for name, question in list(self.pending.items()):
            if question not in ready:
                continue
            del self.pending[name]
            try:
                engine_dead = ray.get(question)
            except ray.exceptions.ActorUnavailableError:  # passing, says Ray
                continue
            except ray.exceptions.RayTaskError as e:
                return f"{name} ({e.cause})"
            except ray.exceptions.RayError:  # died, ran out of memory, lost its node
                return name
            if engine_dead:
                return f"{name}'s engine"
        return None


def _alive(actor) -> bool:
    return False
