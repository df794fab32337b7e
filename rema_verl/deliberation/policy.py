"""The meta-policy (MPDF): an agent's own state attends over its peers' states; three logits.

B states, P peers (padded), D = len(LAYOUT) features. One set of weights serves every agent, any number of peers and any
order of them: a softmax over the peers has neither a place nor a count in it.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rema_verl.deliberation.protocol import ACTIONS
from rema_verl.deliberation.state import LAYOUT, SCHEMA

HEADER = "rema_verl.meta_policy"  # metadata key of the file


class MetaPolicy(nn.Module):
    """Logits over ACTIONS from an agent's features and its peers'.

    Args:
        hidden: width; divisible by ``heads``.
        heads: of the cross-attention.
        outputs: number of logits; PPO's value network has one.
        seed: of the initial weights. torch's global generator is neither read nor moved.
    """

    def __init__(self, hidden: int = 64, heads: int = 4, outputs: int = len(ACTIONS), seed: int = 0):
        super().__init__()
        if hidden < 1 or heads < 1 or hidden % heads:
            raise ValueError(f"the meta-policy's hidden={hidden} must be a positive multiple of heads={heads}")
        self.hidden, self.heads = hidden, heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.own = nn.Sequential(nn.Linear(len(LAYOUT), hidden), nn.GELU(), nn.Linear(hidden, hidden))
            self.peer = nn.Sequential(nn.Linear(len(LAYOUT), hidden), nn.GELU(), nn.Linear(hidden, hidden))
            self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
            self.head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, outputs))

    def forward(self, own: Tensor, peers: Tensor, peer_mask: Tensor | None = None) -> Tensor:
        """(B, D), (B, P, D), (B, P) bool, True where there is a peer (None: everywhere) -> (B, outputs) logits.

        Raises:
            ValueError: shapes that do not match, or a state without a peer.
        """
        batch, width = own.shape if own.dim() == 2 else (-1, -1)
        if width != len(LAYOUT) or peers.dim() != 3 or peers.shape[::2] != own.shape:
            raise ValueError(
                f"expected own (B, {len(LAYOUT)}) and peers (B, P, {len(LAYOUT)}), got {tuple(own.shape)} and "
                f"{tuple(peers.shape)}"
            )
        if peer_mask is not None and peer_mask.shape != peers.shape[:2]:
            raise ValueError(f"expected peer_mask {tuple(peers.shape[:2])}, got {tuple(peer_mask.shape)}")
        if not peers.shape[1] or (peer_mask is not None and not peer_mask.any(dim=1).all()):
            raise ValueError("every state needs at least one peer")
        query, keys = self.own(own), self.peer(peers)
        heard, _ = self.attention(
            query[:, None], keys, keys, key_padding_mask=None if peer_mask is None else ~peer_mask, need_weights=False
        )
        return self.head(torch.cat([query, heard.view(batch, -1)], dim=1))

    @torch.no_grad()
    def act(
        self,
        own: Tensor,
        peers: Tensor,
        peer_mask: Tensor | None = None,
        *,
        greedy: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B,) indices into ACTIONS: the likeliest (the lowest index of equals), or drawn with ``generator``."""
        logits = self(own, peers, peer_mask)
        if greedy:
            return logits.argmax(dim=1)
        return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]

    def save(self, path: str | Path) -> None:
        """One safetensors file with the schema in it; whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        header = {"schema": SCHEMA, "actions": ACTIONS, "hidden": self.hidden, "heads": self.heads}
        try:
            # one entry: of several, safetensors does not keep the order, and equal policies would differ in their bytes
            save_file(self.state_dict(), temporary, {HEADER: json.dumps(header)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "MetaPolicy":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: one line that names the file: absent, no safetensors file, another schema.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path}: not a readable safetensors file ({str(e).splitlines()[0][:120]})") from None
        try:
            header = json.loads(metadata[HEADER])
            schema = str(header["schema"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: not a meta-policy (no schema in the file)") from None
        if schema != SCHEMA:
            raise ValueError(
                f"{path}: a meta-policy for states of schema {schema[:60]!r}, this version has {SCHEMA!r}: "
                f"train it again"
            )
        try:
            policy = cls(int(header["hidden"]), int(header["heads"]))
            policy.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise ValueError(f"{path}: a damaged meta-policy ({str(e).splitlines()[0][:120]})") from None
        return policy.eval()


def collate(rows: Sequence[Sequence[Sequence[float]]], agents: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """States of teams of any sizes as one batch.

    Args:
        rows: B teams' ``team_features``, each N rows of D.
        agents: (B,) which agent of its team is asked.

    Returns:
        own (B, D), peers (B, P, D), peer_mask (B, P).
    """
    most = max(len(team) for team in rows) - 1
    own = torch.tensor([team[i] for team, i in zip(rows, agents, strict=True)], dtype=torch.float32)
    peers = torch.zeros(len(rows), most, own.shape[1])
    mask = torch.zeros(len(rows), most, dtype=torch.bool)
    for b, (team, i) in enumerate(zip(rows, agents, strict=True)):
        others = [row for j, row in enumerate(team) if j != i]
        peers[b, : len(others)] = torch.tensor(others, dtype=torch.float32)
        mask[b, : len(others)] = True
    return own, peers, mask
