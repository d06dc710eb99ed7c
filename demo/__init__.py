"""The Gradio app, installed as visualrwkv.demo."""
