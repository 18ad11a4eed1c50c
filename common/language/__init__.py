"""Language models, framework-neutral: settings, text, preparation, training loop, generation, evaluation."""
