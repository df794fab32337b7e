"""Weight sync inside vLLM's CPU worker.

vLLM's CPU linear layers pack their weight for oneDNN and leave ``layer.weight`` empty, so verl's plain
``load_weights`` has nothing to copy into. vLLM's own layer-wise reload restores the checkpoint layout, loads, and
packs again.
"""

import traceback

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


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
