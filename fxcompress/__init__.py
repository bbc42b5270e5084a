"""fxcompress: a graph-rewriting compiler for model compression."""
