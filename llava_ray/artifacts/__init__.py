"""The records that flow between stages, and the folders and storage behind them."""
