"""How far each stage has come, told by the files that it writes anyway."""
