"""Inside vLLM's CPU worker: weight sync, and seeded requests whose prompt is cut into chunks.

vLLM's CPU linear layers pack their weight for oneDNN and leave ``layer.weight`` empty, so verl's plain
``load_weights`` has nothing to copy into. vLLM's own layer-wise reload restores the checkpoint layout, loads, and
packs again.
"""

import functools
import traceback

import numpy as np
import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


def rewind_cpu_generators() -> None:
    """patches/rewind_cpu_generators.diff: a seeded request whose prompt is prefilled in chunks ends the engine.

    vLLM samples after each chunk, throws the token away and sets the request's generator back by an offset, which only
    generators of accelerators have. Here the generator gets the state back that it had before the draw, so that chunks
    change nothing about what is sampled. Once per process.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    sample, bookkeeping = GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync
    if hasattr(sample, "__wrapped__"):
        return

    @functools.wraps(sample)
    def _sample(self, *args, **kwargs):
        thrown_away = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist()
        generators = {i: self.input_batch.generators.get(i) for i in thrown_away}
        self.before_draw = {i: (g, g.get_state()) for i, g in generators.items() if g is not None}
        return sample(self, *args, **kwargs)

    @functools.wraps(bookkeeping)
    def _bookkeeping_sync(self, *args, **kwargs):
        generators = self.input_batch.generators
        for i, (generator, state) in self.before_draw.items():
            generator.set_state(state)
            del generators[i]  # out of the way of the original, which would ask for its offset
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            generators.update({i: generator for i, (generator, _) in self.before_draw.items()})

    GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync = _sample, _bookkeeping_sync


rewind_cpu_generators()


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension with the reload that packed weights need."""

    @torch.no_grad()
    def update_weights_from_ipc(self, peft_config: dict | None = None, base_sync_done=False, use_shm: bool = False):
        """Receive all weights from the trainer over shared memory and load them.

        Raises:
            NotImplementedError: for an unmerged LoRA adapter.
            RuntimeError: when a weight could not be loaded (after the sender was answered).
        """
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if peft_config and base_sync_done:
            raise NotImplementedError("unmerged LoRA adapters cannot be synchronised on CPU: set model.lora.merge=True")

        model = self.model_runner.get_model()
        failures: list[str] = []

        def load(weights: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
            # verl's protocol has no error reply: an exception here would leave the sender waiting for ever. Finish
            # the protocol and raise afterwards; keep text only, a traceback would hold views of the shared memory.
            if failures:
                return
            try:
                # clone: the reload keeps tensors until their layer is complete, the sender reuses the bucket
                model.load_weights([(name, tensor.clone()) for name, tensor in weights])
            except Exception:
                failures.append(traceback.format_exc())

        initialize_layerwise_reload(model)
        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        receiver.receive_weights(load)
        if failures:
            raise RuntimeError(f"weight sync failed in the vLLM worker:\n{failures[0]}")
        finalize_layerwise_reload(model, self.model_runner.model_config)
        # A tied head shares the embedding's weight but packs a copy of its own, which nothing above refreshed.
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
