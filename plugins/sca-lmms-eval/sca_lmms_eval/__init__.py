"""Adapter of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval): its model `sca` captions regions."""
