"""Where models come from: folders, the Hub, GGUF; what their weights are, and the independent reference."""
