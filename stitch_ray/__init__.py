"""stitch_ray: select data, fine-tune and serve LLMs on Ray, and know when an answer can be trusted."""
