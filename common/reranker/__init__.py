"""Rerankers, framework-neutral: preparation, the training loop, evaluation, analysis, mining, ablation."""
