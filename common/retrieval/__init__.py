"""First-stage retrieval: lexical, dense and their fusion."""
