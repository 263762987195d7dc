"""The synthetic world: scenes, their pictures and motion, their words, and the clips written from them."""
