"""Workers as Ray actors. With finetuning/ray_train.py the only place that imports Ray."""
