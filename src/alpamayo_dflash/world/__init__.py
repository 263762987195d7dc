"""The synthetic world: scenes, their pictures and motion, their words, and the clips written from them.

Names are loaded on first use, so that the config alone costs nothing. `render` and `run` are modules here;
take the functions of the same names from them.
"""
