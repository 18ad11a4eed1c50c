"""QMD's query expansion, framework-neutral: settings, prompts, grammar, evaluation, effect on a search."""
