"""The families of models, a file each; `models.auto` finds whatever stands here."""
