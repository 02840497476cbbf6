"""A model as nanoGPT's (https://github.com/karpathy/nanoGPT), to compare training steps with."""

import torch
from torch import nn


class NanoGPT(nn.Module):
    """
    GPT-2 as nanoGPT writes it: linear maps with `(out, in)` weights, torch's attention, the exact GELU, tied
    embeddings. Its result is the loss of predicting each next token.

    Args:
        n_layer (`int`): Number of blocks.
        n_embd (`int`): Width.
        n_head (`int`): Heads of a block.
        vocab_size (`int`): Number of tokens.
        n_positions (`int`): Longest sequence.
    """

    def __init__(self, n_layer: int, n_embd: int, n_head: int, vocab_size: int, n_positions: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(n_positions, n_embd)
        self.blocks = nn.Sequential(*(_Block(n_embd, n_head) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden_states = self.blocks(self.tokens(input_ids) + self.positions(positions))
        logits = self.head(self.norm(hidden_states))[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


class _Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.norms = nn.ModuleList(nn.LayerNorm(n_embd) for _ in range(2))
        self.attention = nn.Linear(n_embd, 3 * n_embd)
        self.projection = nn.Linear(n_embd, n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch_size, length, width = hidden_states.shape
        states = self.attention(self.norms[0](hidden_states)).view(batch_size, length, 3, self.n_head, -1)
        query, key, value = states.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden_states = hidden_states + self.projection(attended.transpose(1, 2).reshape(batch_size, length, width))
        return hidden_states + self.mlp(self.norms[1](hidden_states))
