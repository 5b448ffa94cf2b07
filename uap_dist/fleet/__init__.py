"""Workers as Ray actors. Beside finetuning/ray_train.py this is the only folder that imports Ray."""
