"""What an operator sees of requests that were sent again, and of workers that were left out."""

from prometheus_client import CollectorRegistry, generate_latest

from tether.telemetry.metrics import REGISTRY
from tether.telemetry.steering_metrics import STEERING, SteeringMetrics


def test_each_is_counted_by_model_and_cause():
    metrics, registry = SteeringMetrics(), CollectorRegistry()
    registry.register(metrics)
    for cause in ("lost", "lost", "doubted"):
        metrics.count("retries", "digits", cause)
    metrics.count("ejections", "digits", "silent")
    text = generate_latest(registry).decode()
    assert 'tether_retries_total{cause="lost",model="digits"} 2.0' in text
    assert 'tether_retries_total{cause="doubted",model="digits"} 1.0' in text
    assert 'tether_ejections_total{cause="silent",model="digits"} 1.0' in text


def test_a_scrape_of_the_gateway_has_them():
    STEERING.count("hedges", "only in this test", "sent")
    assert 'tether_hedges_total{model="only in this test",outcome="sent"} 1.0' in generate_latest(REGISTRY).decode()
