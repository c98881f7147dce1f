"""What a web UI sees of exl_loader: its panel, its gauge, and a page of its own."""
