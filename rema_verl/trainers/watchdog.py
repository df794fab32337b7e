"""Ends a run whose workers or engines have died.

verl 0.9.1 can wait for ever then: a weight sync waits for a vLLM engine that is gone, the replay buffer waits for
trajectories that nobody will deliver. A thread in the trainer's process asks every actor, every few seconds, for a
sign of life; the first one found dead ends the process with one line and exit code 1. Checkpoints are left alone.
"""

import os
import threading
import time

import ray

from rema_verl.errors import PREFIX, complain

GRACE = 2.0  # seconds for Ray to forward the line to the driver's terminal
CLEAN_UP = 30.0  # seconds for the clean-up after an error, which may wait for the dead


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
        self.said = threading.Event()
        self.lock = threading.Lock()
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

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.done.set()
            return
        # The trainer noticed something itself. Say it in one line too, and keep watching: the clean-up that follows
        # (TransferQueue's, Ray's) may wait for the dead.
        if PREFIX in str(error):
            self.said.set()
        elif not self.said.is_set():
            dead = self.find_dead()
            self.say(f"{dead} died" if dead else f"training stopped: {root_cause(error)}")

    def run(self) -> None:
        while not self.done.wait(self.interval):
            if self.said.is_set():
                time.sleep(CLEAN_UP)
                os._exit(1)
            if dead := self.find_dead():
                self.say(f"{dead} died")
                time.sleep(GRACE)
                os._exit(1)

    def say(self, what: str) -> None:
        """The one line, once."""
        with self.lock:
            if not self.said.is_set():
                complain(f"{what}; {self.hint()}")
                self.said.set()

    def find_dead(self) -> str | None:
        """Name and cause of the first dead actor or engine, None if all may still be alive.

        A busy actor answers late; its question stays open and is looked at again in the next round. A dead one's
        question fails at once.
        """
        with self.lock:
            return self._find_dead()

    def _find_dead(self) -> str | None:
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


def root_cause(e: BaseException) -> str:
    """The last line of the innermost error, without Ray's traceback."""
    while (inner := getattr(e, "cause", None) or e.__cause__) is not None:
        e = inner
    lines = [line for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[-1].strip() if lines else ''}"


def _alive(actor) -> bool:
    return False
