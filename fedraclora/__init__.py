"""Federated RAC-LoRA without a network: the chain of low-rank links, cohort training and the byte ledger.

The algorithm alone, on torch, numpy and safetensors: the server half lives in `strategies`, the client half in
`clients`, and what a user runs in `experiments`; none of them is imported from here. The method is Fed-RAC-LoRA of
G. Malinovsky et al., "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank
Adaptation", 2024, arXiv 2410.08305.
"""

__version__ = "0.1.0"
