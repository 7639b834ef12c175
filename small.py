import runpy


def get_config():
    config = runpy.run_path('mydata/mydata.py')['get_config']()
    config.model.depth=18
    config.model.width=8
    config.data.image_size_pixels=16
    config.global_batch_size=16
    config.label_embedding.dim=4
    config.evaluate_every_steps=20
    return config
