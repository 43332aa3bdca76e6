"""Tracing with OpenTelemetry: a span for each attempt, in the trace of the request that the workflow began with.

    pip install opentelemetry-sdk
    python examples/tracing.py

The request's trace id travels in the workflow's context, so that a step that runs days later, on another host, still
belongs to it. An application exports to a collector; this one prints its spans.
"""

from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from peewee import CharField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("shop")

db = SqliteDatabase("tracing.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


class Order(Model):
    article = CharField()

    class Meta:
        database = db


class Traced(Workflow):
    """The base class of all workflows of an application that traces them."""

    @classmethod
    def create(cls, hero, context=None, **options):
        carrier = {}
        propagate.inject(carrier)
        return super().create(hero, context={**(context or {}), "trace": carrier}, **options)

    def around_step_execution(self, execution):
        return tracer.start_as_current_span(
            f"{self.type}.{execution.step_name}",
            context=propagate.extract(self.context.get("trace", {})),
            attributes={"workflow.id": self.id, "execution.number": execution.number},
        )


class Fulfilment(Traced):
    @step(on_exception="reattempt")
    def charge(self):
        if self.execution_history.count() == 1:
            raise ConnectionError("the bank does not answer")

    @step
    def ship(self):
        with tracer.start_as_current_span("print label"):
            pass


if __name__ == "__main__":
    drive.create_tables([Order])
    with tracer.start_as_current_span("POST /orders"):
        Fulfilment.create(hero=Order.create(article="book"))
    drive.run(until=lambda: not Fulfilment.ongoing().exists())
    spans = exporter.get_finished_spans()
    names = {span.context.span_id: span.name for span in spans}
    for span in spans:
        under = names[span.parent.span_id] if span.parent else "nothing"
        print(f"{span.name}: under {under}, {span.status.status_code.name}")
    print(f"{len({span.context.trace_id for span in spans})} trace")
